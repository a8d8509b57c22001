"""Registers the Hugging Face quantizer without anyone importing this package.

torch calls `register` at the end of `import torch` (entry point group `torch.backends`). It must cost
nothing there, so it only leaves a finder on `sys.meta_path` that acts when transformers imports its
quantizers: then, and not before, our quantizer is imported and added to them.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

WATCHED = "transformers.quantizers.auto"


def register() -> None:
    """Add the quantizer to transformers: now if its quantizers are imported, else when they are. Idempotent."""
    if _imported():
        _add_quantizer()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _imported() -> bool:
    """True once `WATCHED` is complete: it may itself be what imports torch first, and so calls us half way."""
    module = sys.modules.get(WATCHED)
    return module is not None and not getattr(module.__spec__, "_initializing", False)


def _add_quantizer() -> None:
    # The module registers itself at its end: here it may be half imported, when its own import of
    # transformers is what got us called.
    importlib.import_module("unicorn_backend.integration.hf_quantizer")


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only `WATCHED`, once, the way the other finders do, and wraps its loader.

    Where `WATCHED` was half imported at registration, the next import after its end registers.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            if _imported():
                sys.meta_path.remove(self)
                _add_quantizer()
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, and then our registration."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        _add_quantizer()
