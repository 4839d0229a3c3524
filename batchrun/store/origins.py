"""Where each row's answer comes from, in one number a row: a file beside the run's checkpoint.

A row is sent, or takes its answer without a request: of an earlier result, or of an equal row before it in this run.
The numbers are found once, when the input is checked, so that a chunk knows its own whenever it is opened or sealed.
"""

import os
from array import array
from pathlib import Path
from typing import Self

import msgspec

from batchrun import durable
from batchrun.durable import disk_errors
from batchrun.store.row_numbers import RowNumbers

ENTRY = "origins"
"""The manifest's entry that says what the file is made of."""

SENT = -1
"""The row is sent, and no later row wants its answer."""

# at and below it: the row is sent, and the number says which later row is the last to take its answer. Copies have the
# numbers between it and -1: room for 2 * 10**12 rows
_WANTED = -(1 << 41)
_ROWS_A_FILE = 1 << 32


def earlier(file: int, row: int) -> int:
    """The answer is that of a row of an earlier result's file; both count from 0."""
    return file * _ROWS_A_FILE + row


def place(origin: int) -> tuple[int, int] | None:
    """The file and its row that an origin names; None where it names none."""
    return divmod(origin, _ROWS_A_FILE) if origin >= 0 else None


def copy_of(row: int) -> int:
    """The answer is that of an equal row before it."""
    return -2 - row


def original(origin: int) -> int | None:
    """The equal row before it whose answer the row takes; None where it takes none."""
    return -2 - origin if _WANTED < origin < SENT else None


def wanted_until(row: int) -> int:
    """The row is sent, and `row` is the last one that takes its answer."""
    return _WANTED - row


def last_copy(origin: int) -> int:
    """The last row that takes this one's answer; -1 where none does."""
    return _WANTED - origin if origin <= _WANTED else -1


def encode(made: "Origins | None") -> dict[str, str]:
    """The manifest's entry for the origins."""
    return {ENTRY: msgspec.json.encode(made).decode()}


class OldFile(msgspec.Struct, frozen=True):
    """A file of earlier answers as it was when they were looked up. `name` is its run's directory, else its path."""

    path_bytes: bytes
    name: str
    size: int
    mtime_ns: int

    @property
    def path(self) -> Path:
        """Where it is."""
        return Path(os.fsdecode(self.path_bytes))


class Origins(msgspec.Struct, frozen=True):
    """What the file was made of, and what it says. `digest` is the file's; None: every row is sent, there is no file.

    `reused` rows take an earlier answer and `duplicates` that of an equal row; the others are sent. The file begins
    with `first_row`.
    """

    rows: int
    layout: int
    dedupe: bool
    statuses: tuple[str, ...]
    sources: tuple[str, ...]
    files: tuple[OldFile, ...] = ()
    reused: int = 0
    duplicates: int = 0
    digest: str | None = None
    first_row: int = 0

    @property
    def new(self) -> int:
        """The rows that are sent."""
        return self.rows - self.reused - self.duplicates

    def made_of(self) -> "Origins":
        """The same without what was found."""
        return msgspec.structs.replace(self, files=(), reused=0, duplicates=0, digest=None)


class OriginsWriter:
    """A new file of origins, created with the first row that is not sent. Use it as a context manager, and `keep` it
    if anything was written.
    """

    def __init__(self, path: Path, rows: int, first_row: int = 0) -> None:
        self._path = path
        self._first_row = first_row
        self._temporary = path.with_name(path.name + durable.TEMP_SUFFIX)
        self._rows = rows
        self._file = -1
        self._numbers: RowNumbers | None = None

    def __setitem__(self, row: int, origin: int) -> None:
        if self._numbers is None:
            with disk_errors(self._path):
                self._file = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            self._numbers = RowNumbers(self._file, self._rows, self._path)
            self._numbers.fill(SENT)
        self._numbers[row - self._first_row] = origin

    def keep(self) -> str:
        """The file is there under its name, durable; returns its digest."""
        with disk_errors(self._path):
            os.fsync(self._file)
            self._temporary.rename(self._path)
            durable.fsync(self._path.parent)
        return durable.digest(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._numbers is not None:
            os.close(self._file)
            self._temporary.unlink(missing_ok=True)


def read(path: Path, first_row: int, end_row: int) -> "array[int]":
    """The origins of these rows, counted from the file's first one."""
    numbers = array("q")
    with disk_errors(path), path.open("rb") as file:
        file.seek(8 * first_row)
        numbers.frombytes(file.read(8 * (end_row - first_row)))
    return numbers
