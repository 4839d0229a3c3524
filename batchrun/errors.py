"""Every error that batchrun raises, and the exit code each way out has.

    BatchrunError
    ├── JobError                a job file, flag or setting is wrong
    ├── InputError              an input file or record is wrong
    ├── CheckpointError         the run directory is damaged or of another version
    │   ├── RunLockedError      another process holds the run directory
    │   └── DiskError           the disk refused a write: full, failing, read-only
    ├── StorageError            the object store refused, failed or can't be reached
    ├── RunStoppedError         the run ended before it was complete, for a reason outside its rows
    └── APIConnectionError      one HTTP exchange ended without a complete answer
        └── APITimeoutError     not within its deadline

A failed row is data, not an exception: an `APIConnectionError` travels as a value inside an `Attempt`. Only a failed
run raises.
"""

import os
import shlex
from enum import IntEnum
from functools import partial


class ExitCode(IntEnum):
    """The process exit codes. Never 99: schedulers such as Airflow read it as "skipped"."""

    COMPLETE = 0
    INTERNAL_ERROR = 1
    USAGE = 2
    TOO_MANY_FAILURES = 3
    STOPPED = 4
    PAUSED = 5
    LOCKED = 6
    DAMAGED = 7
    DRIFT = 8
    SIGHUP = 129
    SIGINT = 130
    SIGPIPE = 141
    SIGTERM = 143


ANOTHER = "start another run (--new, or another -o)"
"""The last resort that an error line can offer."""


def writable(text: str) -> str:
    """The text as every file can hold it: bytes of a file name that are not UTF-8 are written like `\\xe9`."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a half of a surrogate pair that comes from no file name
        return text.encode("utf-8", "replace").decode()


def harmless(text: str) -> str:
    """The text with control and bidirectional characters escaped, so that a model's or server's text is only text."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in writable(text))


def quoted(word: object) -> str:
    """The word quoted for a shell. A name that is not UTF-8 is written byte by byte, which bash and zsh can read."""
    text = str(word)
    try:
        text.encode()
    except UnicodeEncodeError:
        spelt = "".join(f"\\x{byte:02x}" for byte in os.fsencode(text))
        return f"$'{spelt}'"
    return shlex.quote(text)


class BatchrunError(Exception):
    """A failed run. The message is one line: what, where, and what to do next. It is `writable`."""

    exit_code = ExitCode.INTERNAL_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(writable(message))


class JobError(BatchrunError):
    """The job, a flag or a setting is wrong; nothing was sent."""

    exit_code = ExitCode.USAGE


class InputError(BatchrunError):
    """An input file or record is wrong. The message starts with `file:line` or `file` if there is one."""

    exit_code = ExitCode.USAGE


class CheckpointError(BatchrunError):
    """The run directory can't be trusted: damaged, or written by another version."""

    exit_code = ExitCode.DAMAGED


class RunLockedError(CheckpointError):
    """Another process works in this run directory; nothing was sent."""

    exit_code = ExitCode.LOCKED


class DiskError(CheckpointError):
    """The disk refused a write. What was received before is kept; run again when there is room."""

    exit_code = ExitCode.PAUSED


class StorageError(BatchrunError):
    """The object store refused, failed or can't be reached. What was received is kept; the same command tries again."""

    exit_code = ExitCode.PAUSED


class RunStoppedError(BatchrunError):
    """The run ended early with its rows intact; `exit_code` says why."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class APIConnectionError(BatchrunError):
    """No whole answer arrived. `sent` is False only if no byte of the request can have reached the server."""

    def __init__(self, message: str, *, kind: str, sent: bool) -> None:
        super().__init__(message)
        self.kind = kind
        self.sent = sent

    def __reduce__(self) -> tuple[object, ...]:  # pickle calls the class without its keyword arguments by default
        return partial(type(self), kind=self.kind, sent=self.sent), self.args


class APITimeoutError(APIConnectionError):
    """No whole answer arrived within the attempt's deadline."""
