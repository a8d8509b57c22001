"""unicorn_backend: stock Hugging Face models, quantized and fast, on AMD laptops.

    stock HF model -> quantize/ -> graph/ -> plan -> native CPU kernels (ops/)
                      rewrite      capture,  what runs where,
                      weights      match     and why

Use: `model = torch.compile(model, backend="unicorn"); model.generate(...)`. No import of this
package is needed for that; import it for `quantize`, `explain` and the errors.
"""

from unicorn_backend import ops as _ops  # noqa: F401  (defines the unicorn:: ops)
from unicorn_backend.errors import (
    CheckpointError,
    NativeLibraryError,
    OptionError,
    QuantizationError,
    StrictModeError,
    UnicornError,
)
from unicorn_backend.explain import Explanation, explain
from unicorn_backend.integration import autoload as _autoload
from unicorn_backend.options import Options
from unicorn_backend.quantize.recipe import Recipe, recipes
from unicorn_backend.quantize.rewrite import quantization_report, quantize, restore

_autoload.register()

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Explanation",
    "NativeLibraryError",
    "OptionError",
    "Options",
    "QuantizationError",
    "Recipe",
    "StrictModeError",
    "UnicornError",
    "explain",
    "quantization_report",
    "quantize",
    "recipes",
    "restore",
]
