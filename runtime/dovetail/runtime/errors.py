"""The exceptions that Dovetail raises on purpose.

DovetailError
├── InputError          a value given by the caller: prompt, flag, sampling parameter
│   └── ContextOverflow prompt and answer do not fit the context
├── QueueFull           an engine that takes no further request now
├── PairError           a pair folder that cannot be used
│   ├── ManifestError   dovetail.json: missing, unknown key, another version
│   ├── IntegrityError  a file that is missing, truncated or altered
│   └── MismatchError   drafter and target do not belong together
├── SourceError         a checkpoint, GGUF, IR or Hub id that cannot be read
├── ExportError         a build stage that failed (parity, full disk, no tap point)
├── TrainError          a training run that cannot start or continue
└── DeviceError         an engine or device that is missing or failed

Each message is one line. The line names the value and says what to do.
"""

INTERRUPTED = 130  # exit code of a command that Ctrl-C ends


def one_line(error: BaseException) -> str:
    """Return another library's error text in one line, or the error's type if there is no text."""
    return " ".join(str(error).split()) or type(error).__name__


def install_extra(extra: str) -> str:
    """Return the command that installs an optional part, such as `cuda`, for use in a message."""
    return f"run pip install '.[{extra}]' in a clone of Dovetail"


class DovetailError(Exception):
    """Base of every error that Dovetail raises on purpose.

    `exit_code` is the exit code of the command that fails with this error.
    """

    exit_code = 1


class InputError(DovetailError):
    """A value given by the caller cannot be used."""

    exit_code = 2


class ContextOverflow(InputError):
    """Prompt and answer do not fit the target's context."""


class QueueFull(DovetailError):
    """An engine takes no further request: too many wait, or the engine is shutting down."""


class PairError(DovetailError):
    """A pair folder cannot be used."""

    exit_code = 3


class ManifestError(PairError):
    """`dovetail.json` is missing, malformed, of another version or has an unknown key."""


class IntegrityError(PairError):
    """A file of the pair is missing, truncated or altered."""


class MismatchError(PairError):
    """Drafter and target do not belong together."""


class SourceError(DovetailError):
    """A checkpoint, GGUF file, IR folder or Hub id cannot be read."""

    exit_code = 4


class ExportError(DovetailError):
    """A build stage failed. The exporter removes half-written files."""

    exit_code = 5


class TrainError(DovetailError):
    """A training run cannot start or continue."""

    exit_code = 6


class DeviceError(DovetailError):
    """An engine or a device is missing or failed."""

    exit_code = 7
