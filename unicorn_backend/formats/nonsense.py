"""What transformers and torch raise for a config that makes no sense, from a file that is otherwise sound."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

NONSENSE = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    AssertionError,
    RuntimeError,
    StrictDataclassError,
)
