"""What the package carries besides Python: the native library and the embedded model."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from unicorn_backend import ops as _ops  # noqa: F401  (defines the unicorn:: ops)
from unicorn_backend.errors import NativeLibraryError, OptionError
from unicorn_backend.options import forced_isa

PACKAGE = Path(__file__).parent
LIBRARY = "libunicorn_ops.so"


@functools.cache
def load_native() -> Path:
    """Load the CPU kernels, once per process. Returns the file; raises NativeLibraryError."""
    path = _find()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"{path} does not load with torch {torch.__version__}: {error}. "
            "It was probably built for another torch; rebuild it: pip install --no-build-isolation ."
        ) from error
    _force_isa(forced_isa())
    return path


def _force_isa(name: str) -> None:
    allowed = torch.ops.unicorn.isas()
    if name and name not in allowed:
        raise OptionError(f"environment variable UNICORN_ISA: got {name!r}, this CPU runs {', '.join(allowed)}")
    torch.ops.unicorn.set_isa(name)


def isa() -> str:
    """Name of the instruction set whose kernels run."""
    load_native()
    return str(torch.ops.unicorn.set_isa(forced_isa()))


def embedded_model() -> Path:
    """Folder of the embedded tiny Gemma 3: config, tokenizer, safetensors."""
    return PACKAGE / "models" / "tiny-gemma3"


def _find() -> Path:
    """Next to this file, or where an editable install puts it (site-packages)."""
    import sysconfig

    for folder in (PACKAGE, Path(sysconfig.get_path("platlib")) / PACKAGE.name):
        if (folder / LIBRARY).is_file():
            return folder / LIBRARY
    raise NativeLibraryError(
        f"{LIBRARY} is not in {PACKAGE}: the package is not built. "
        "Install it with a C++ compiler at hand: pip install --no-build-isolation . (or `make install`)"
    )
