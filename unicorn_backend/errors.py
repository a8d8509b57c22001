"""Every error that unicorn_backend raises on its own account.

A message says what was asked, what was got, what is allowed, and what to do.
"""


class UnicornError(Exception):
    """Base of all errors of this package."""


class OptionError(UnicornError, ValueError):
    """An unknown option, recipe or scheme, or a value outside what is allowed."""


class QuantizationError(UnicornError, ValueError):
    """A weight cannot be quantized: NaN or Inf, a meta tensor, a wrong dtype or shape."""


class CheckpointError(UnicornError, ValueError):
    """A quantized checkpoint is corrupt, truncated, or of a newer version."""


class NativeLibraryError(UnicornError, ImportError):
    """The native CPU library is missing or was built for another torch."""


class StrictModeError(UnicornError, RuntimeError):
    """`strict=True` and something was not taken; the message lists every reason."""


class CheckFailedError(UnicornError, RuntimeError):
    """A check that the caller asked for has failed: a threshold of quality, or a checksum."""


class RequestError(UnicornError, ValueError):
    """A prompt that cannot be answered: empty, longer than the context, refused by the chat template.

    code: a word for programs, in the terms of the OpenAI API where it has one.
    """

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.code = code
