"""What an error of a store says to the user, and whether it passes by itself: by the texts of pyarrow 26."""

import pytest

from batchrun.errors import InputError, StorageError
from batchrun.storage import failures

UPLOAD = "When uploading object with key 'x/a' in bucket 'data': AWS Error {} operation: {}"
UNKNOWN = "UNKNOWN (HTTP status {}) during {}"
UNPARSED = "Unable to parse ExceptionName: {} Message: the words of it"

CASES = {
    UPLOAD.format(UNKNOWN.format(400, "PutObject"), UNPARSED.format("ExpiredToken")): (
        True,
        "ExpiredToken during PutObject: the words of it; the credentials have expired; renew them",
    ),
    UPLOAD.format(UNKNOWN.format(400, "HeadObject"), "No response body."): (
        False,
        "HTTP status 400 during HeadObject; the store gives no reason; expired credentials and a wrong region look "
        "like this",
    ),
    UPLOAD.format(UNKNOWN.format(301, "PutObject"), UNPARSED.format("PermanentRedirect")): (
        False,
        "PermanentRedirect during PutObject: the words of it; the bucket is in another region or behind another "
        "endpoint; set storage.region, storage.endpoint",
    ),
    UPLOAD.format("REQUEST_TIME_TOO_SKEWED during PutObject", "the words of it"): (
        False,
        "REQUEST_TIME_TOO_SKEWED during PutObject: the words of it; the clock of this machine differs from the "
        "store's; set it",
    ),
    UPLOAD.format(UNKNOWN.format(403, "PutObject"), UNPARSED.format("QuotaExceeded")): (
        False,
        "access is denied (QuotaExceeded during PutObject: the words of it); check the credentials and what they may "
        "do (docs/storage.md)",
    ),
    UPLOAD.format("[code 138] during PutObject", "the words of it"): (
        False,
        "[code 138] during PutObject: the words of it",
    ),
    UPLOAD.format(UNKNOWN.format(429, "PutObject"), UNPARSED.format("TooManyRequests")): (
        True,
        "TooManyRequests during PutObject: the words of it",
    ),
    UPLOAD.format("SLOW_DOWN during PutObject", "its words"): (True, "SLOW_DOWN during PutObject: its words"),
    UPLOAD.format(UNKNOWN.format(507, "PutObject"), UNPARSED.format("XMinioStorageFull")): (
        True,
        "XMinioStorageFull during PutObject: the words of it",
    ),
}


@pytest.mark.parametrize("text", CASES)
def test_a_stores_error_is_one_helpful_line(text: str) -> None:
    passes, line = CASES[text]
    error = OSError(text)
    assert failures.reason(error) == line
    assert failures.is_transient(error) == passes
    kind = StorageError if passes else InputError
    with pytest.raises(kind, match=r"^s3://data/x can't be read: "), failures.reading("s3://data/x"):
        raise error
    with pytest.raises(StorageError, match=r"^s3://data/x can't be written: "), failures.writing("s3://data/x"):
        raise error
