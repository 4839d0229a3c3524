"""The meaning of an error of a store, in one line: whether it passes by itself, and what to do."""

import contextlib
import re
from collections.abc import Iterator

from batchrun.errors import BatchrunError, InputError, StorageError
from batchrun.patterns import Pattern

_TRANSIENT = Pattern(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING|curlCode|"
    r"HTTP status (?:5\d\d|429)|ExpiredToken|EXPIRED_TOKEN|"
    r"Status\((?:UNAVAILABLE|DEADLINE_EXCEEDED|INTERNAL|RESOURCE_EXHAUSTED)|\] 5\d\d |\b50[0234]\b|"
    r"[Tt]imed? ?out|Timeout|[Cc]onnect|temporarily|Name or service not known"
)
_DENIED = Pattern(
    r"ACCESS_DENIED|SIGNATURE_DOES_NOT_MATCH|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|UNRECOGNIZED_CLIENT|"
    r"HTTP status 40[13]|"
    r"Status\((?:PERMISSION_DENIED|UNAUTHENTICATED)|AuthenticationFailed|AuthorizationFailure|\] 40[13] |40[13] Client"
)
_NO_BUCKET = Pattern(r"NO_SUCH_BUCKET|[Bb]ucket.{0,80}(?:does not exist|not found)|ContainerNotFound")
_HINTS = (
    (Pattern(r"ExpiredToken|EXPIRED_TOKEN"), "the credentials have expired; renew them"),
    (Pattern(r"REQUEST_TIME_TOO_SKEWED"), "the clock of this machine differs from the store's; set it"),
    (
        Pattern(r"HTTP status 301|AuthorizationHeaderMalformed"),
        "the bucket is in another region or behind another endpoint; set storage.region, storage.endpoint",
    ),
    (
        Pattern(r"HTTP status 400\) during Head"),
        "the store gives no reason; expired credentials and a wrong region look like this",
    ),
    (_DENIED, "check the credentials and what they may do (docs/storage.md)"),
)
"""Advice on an error; the first that fits."""

_AWS = Pattern(
    r"AWS Error (\w+|\[code \d+\])(?: \((HTTP status \d+)\))? during (\w+) operation: "
    r"(?:Unable to parse ExceptionName: (\S+) Message: )?(.*)",
    re.DOTALL,
)
_STATUS = Pattern(r"google::cloud::Status\((.*?)(?: error_info|\)$)", re.DOTALL)

_LEFT = (BatchrunError, ImportError, ValueError, AttributeError, AssertionError)
"""Not errors of a store, or translated elsewhere. The file systems of fsspec may raise any other type."""

NEXT = "run the same command again"


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: an outage, a timeout, a refusal for too many requests."""
    text = f"{type(error).__name__} {error}"
    return not (_DENIED.search(text) or _NO_BUCKET.search(text)) and bool(_TRANSIENT.search(text))


def reason(error: BaseException) -> str:
    """The error in one line, without the SDK's own frame, and with what to do about it where that is known."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if _NO_BUCKET.search(text):
        return "there is no such bucket"
    hint = next((hint for pattern, hint in _HINTS if pattern.search(text)), None)
    cause = f"access is denied ({_cause(text)})" if _DENIED.search(text) else _cause(text)
    return cause if hint is None else f"{cause}; {hint}"


def _cause(text: str) -> str:
    if (aws := _AWS.search(text)) is not None:
        detail = aws[5].removesuffix(".").partition("; Details:")[0]
        return f"{aws[4] or aws[2] or aws[1]} during {aws[3]}" + ("" if detail == "No response body" else f": {detail}")
    if (google := _STATUS.search(text)) is not None:
        return google[1]
    return text[:300] or "an unknown error"


@contextlib.contextmanager
def reading(place: object) -> Iterator[None]:
    """Errors of the store while `place` is read: an InputError if the input is wrong, a StorageError if the store is
    away.
    """
    try:
        yield
    except _LEFT:
        raise
    except Exception as error:
        if is_transient(error):
            raise StorageError(f"{place} can't be read: {reason(error)}; {NEXT} when the store answers") from error
        raise InputError(f"{place} can't be read: {reason(error)}") from error


@contextlib.contextmanager
def writing(place: object) -> Iterator[None]:
    """Errors of the store while something is written at `place`."""
    try:
        yield
    except _LEFT:
        raise
    except Exception as error:
        raise StorageError(f"{place} can't be written: {reason(error)}; correct that, then {NEXT}") from error
