"""unicorn_backend: stock Hugging Face models, quantized and fast, on AMD laptops.

    stock HF model -> quantize/ -> graph/ -> plan -> native CPU kernels (ops/)
                      rewrite      capture,  what runs where,
                      weights      match     and why

Use: `model = torch.compile(model, backend="unicorn"); model.generate(...)`. No import of this
package is needed for that; import it for `quantize`, `explain` and the errors.

Names are imported when they are first used, because `import torch` itself imports this package (the
`torch.backends` entry point, see `integration/autoload.py`) and must stay fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from unicorn_backend.errors import (
    CheckFailedError,
    CheckpointError,
    NativeLibraryError,
    OptionError,
    QuantizationError,
    StrictModeError,
    UnicornError,
)
from unicorn_backend.integration import autoload as _autoload

if TYPE_CHECKING:
    from unicorn_backend.explanation import Explanation, explain
    from unicorn_backend.integration.hf_quantizer import UnicornConfig
    from unicorn_backend.integration.int8_cache import Int8Cache
    from unicorn_backend.options import Options
    from unicorn_backend.quantize.recipe import Recipe, recipes
    from unicorn_backend.quantize.rewrite import quantization_report, quantize, restore
    from unicorn_backend.quantize.stream import quantize_checkpoint
    from unicorn_backend.quantize.verify import verify
    from unicorn_backend.timing import timed

_autoload.register()

__version__ = "0.1.0"

_HOMES = {
    "Explanation": "explanation",
    "Int8Cache": "integration.int8_cache",
    "Options": "options",
    "Recipe": "quantize.recipe",
    "UnicornConfig": "integration.hf_quantizer",
    "explain": "explanation",
    "quantization_report": "quantize.rewrite",
    "quantize_checkpoint": "quantize.stream",
    "recipes": "quantize.recipe",
    "restore": "quantize.rewrite",
    "timed": "timing",
    "verify": "quantize.verify",
}


def __getattr__(name: str) -> Any:
    if name == "quantize":  # a package that can be called, see there
        return importlib.import_module("unicorn_backend.quantize")
    if name not in _HOMES:
        raise AttributeError(f"module 'unicorn_backend' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"unicorn_backend.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


__all__ = [
    "CheckFailedError",
    "CheckpointError",
    "Explanation",
    "Int8Cache",
    "NativeLibraryError",
    "OptionError",
    "Options",
    "QuantizationError",
    "Recipe",
    "StrictModeError",
    "UnicornConfig",
    "UnicornError",
    "explain",
    "quantization_report",
    "quantize",
    "quantize_checkpoint",
    "recipes",
    "restore",
    "timed",
    "verify",
]
