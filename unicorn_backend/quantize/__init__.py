"""The quantization pass. The package can be called: `unicorn_backend.quantize(model, recipe="default")`.

It shares its name with the function, and whichever was imported last would hide the other; so calling
the package calls `rewrite.quantize`.
"""

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from unicorn_backend.quantize.rewrite import quantize

        return quantize(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
