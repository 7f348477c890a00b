"""The one exception family whose messages are written for users.

Whatever a user can cause raises a subclass of `TesseraqError` with one line that says what is wrong and what to do. The
CLI prints that line and exits with `exit_code`; anything else that reaches the CLI is a bug and shows its traceback.
"""


class TesseraqError(Exception):
    """Base of every error meant for a user. `str(error)` is one clear line."""

    exit_code = 1


class UsageError(TesseraqError):
    """An option, a name or a path that cannot be meant: unknown type, unknown method, output is a folder."""

    exit_code = 2


class ModelError(TesseraqError):
    """The model cannot be found, read, or is of a kind that this project does not learn."""


class CalibrationError(TesseraqError):
    """The calibration text is missing, empty or too short."""


class NotFiniteError(TesseraqError):
    """Weights, activations, or what is learned from them are not finite; the message names block and matrix."""


class FileFormatError(TesseraqError):
    """A GGUF file is missing, truncated, corrupt, or of a type that the reader does not know."""


class ConversionError(TesseraqError):
    """The file cannot be written: llama.cpp's converter refuses the model, or the disk is full.

    Attributes:
        log: what the converter said, for a bug report.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class RuntimeBuildError(TesseraqError):
    """The runtime cannot be fetched, verified, patched, built or proven."""


class RuntimeMissingError(TesseraqError):
    """No runtime for this version and these patches is installed; the message says how to get one."""


class BindingsError(TesseraqError, ValueError, RuntimeError):
    """The Python bindings were asked for what llama.cpp would end the process for, or what never ends.

    It is both of what llama-cpp-python itself raises, so that programs written for that go on catching it.
    """


class ModelLoadError(FileFormatError, BindingsError):
    """llama.cpp refuses a file that is a whole GGUF file, or has no memory for it."""


class ChatTemplateError(BindingsError):
    """A chat template cannot be read, fails on these messages, or makes nothing of them."""


class EvaluationError(TesseraqError):
    """The perplexity tool of the runtime failed, what it found is no number, or the disk has no room for its logits.

    Attributes:
        log: what the tool said last.
    """

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class PublishingError(TesseraqError):
    """A folder to publish cannot be written, or the hub does not take it. No message has a token in it."""


class VerificationError(TesseraqError):
    """What was written does not equal what was learned. Never expected; always worth a bug report."""
