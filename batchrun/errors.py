"""Every error that batchrun raises, and the exit code each way out has.

    BatchrunError
    ├── JobError                a job file, flag or setting is wrong
    ├── InputError              an input file or record is wrong
    ├── CheckpointError         the run directory is damaged or of another version
    │   ├── RunLockedError      another process holds the run directory
    │   └── DiskError           the disk refused a write: full, failing, read-only
    ├── RunStoppedError         the run ended before it was complete, for a reason outside its rows
    └── APIError                what one HTTP exchange with the endpoint came to
        ├── APIConnectionError  no answer: the name, connection or transfer failed
        │   └── APITimeoutError no answer in time
        └── APIStatusError      an answer that is not a completion
            ├── BadRequestError, AuthenticationError, RateLimitError, InternalServerError

A failed row is data, not an exception: `APIError`s travel as values inside an `Attempt`. Only a failed run raises.
"""

from enum import IntEnum


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
"""The way on that every run has, in the words of an error's line."""


class BatchrunError(Exception):
    """A failed run, told in one line: what, where, and what to do next."""

    exit_code = ExitCode.INTERNAL_ERROR


class JobError(BatchrunError):
    """The job, a flag or a setting is wrong; nothing was sent."""

    exit_code = ExitCode.USAGE


class InputError(BatchrunError):
    """An input file or record is wrong. The message begins with `file:line` or `file` where there is one."""

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


class RunStoppedError(BatchrunError):
    """The run ended early with its rows intact; `exit_code` says by whose rule."""

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class APIError(BatchrunError):
    """What one exchange with the endpoint came to, when it was not a completion. Can be pickled."""

    def __reduce__(self) -> tuple[object, ...]:  # the usual way calls the class without its keyword arguments
        return _restored, (type(self), self.args, vars(self))


class APIConnectionError(APIError):
    """No whole answer arrived. `sent` is False only where no byte of the request can have reached the server."""

    def __init__(self, message: str, *, kind: str, sent: bool) -> None:
        super().__init__(message)
        self.kind = kind
        self.sent = sent


class APITimeoutError(APIConnectionError):
    """No whole answer arrived within the attempt's deadline."""


class APIStatusError(APIError):
    """The server answered with something that is not a completion."""

    def __init__(self, message: str, *, http_status: int, code: str | None = None) -> None:
        super().__init__(message)
        self.http_status = http_status
        self.code = code


class BadRequestError(APIStatusError):
    """400, 413, 415 or 422: this row's request can't be served as it is."""


class AuthenticationError(APIStatusError):
    """401: the key is missing, wrong or revoked."""


class RateLimitError(APIStatusError):
    """429: too many requests. `retry_after_s` is what the server asked for, in seconds, if it did."""

    def __init__(
        self, message: str, *, http_status: int, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, http_status=http_status, code=code)
        self.retry_after_s = retry_after_s


class InternalServerError(APIStatusError):
    """5xx: the server's own trouble."""


def _restored(kind: type[APIError], args: tuple[object, ...], fields: dict[str, object]) -> APIError:
    """The error that was pickled."""
    error = kind.__new__(kind, *args)
    vars(error).update(fields)
    return error
