"""Matches new rows with old answers by request key: the k-th row of a key gets the k-th answer to it.

Memory is flat for any number of rows: both sides are spread over buckets by their first bits, in files without a name,
and matched bucket by bucket.
"""

import struct
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from batchrun.durable import disk_errors
from batchrun.store.row_numbers import RowNumbers

NONE = -1
"""The old row of a new request."""

ROWS_A_BUCKET = 250_000
MAX_BUCKETS = 48  # two files each: within a small limit on open files together with all else
BUFFER_BYTES = 1 << 16

_ENTRY = struct.Struct("<16sq")


class Matches(RowNumbers):
    """For each new row, in order, the old row whose answer it takes, or `NONE`. Close it."""

    def __init__(self, rows: int, directory: Path) -> None:
        with disk_errors(directory):
            self._unnamed = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (lives as long as this object)
        super().__init__(self._unnamed.fileno(), rows, directory)
        self.fill(NONE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unnamed.close()


class Questions:
    """A digest of each record by ordinal, in a file without a name: its request key, or the digest of its images."""

    def __init__(self, directory: Path) -> None:
        with disk_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory, buffering=BUFFER_BYTES)  # noqa: SIM115

    def add(self, ordinal: int, key: bytes) -> None:
        """Adds the next record; ordinals ascend."""
        self._file.write(_ENTRY.pack(key, ordinal))

    def rows(self, rejected: Sequence[int]) -> Iterator[tuple[bytes, int]]:
        """(key, row) of each record that was not rejected. The ordinals in `rejected` ascend."""
        self._file.seek(0)
        place = 0
        while block := self._file.read(_ENTRY.size * 4096):
            for key, ordinal in _ENTRY.iter_unpack(block):
                while place < len(rejected) and rejected[place] < ordinal:
                    place += 1
                if place < len(rejected) and rejected[place] == ordinal:
                    continue
                yield key, ordinal - place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def match(old: Iterable[tuple[bytes, int]], new: Iterable[tuple[bytes, int]], rows: int, directory: Path) -> Matches:
    """Matches `rows` new rows. Both sides are (key, row), in the order of rows."""
    buckets = buckets_of(rows)
    matches = Matches(rows, directory)
    with Spread(old, buckets, directory) as answers, Spread(new, buckets, directory) as questions:
        for bucket in range(buckets):
            waiting: dict[bytes, deque[int]] = {}
            for key, row in answers.entries(bucket):
                waiting.setdefault(key, deque()).append(row)
            for key, row in questions.entries(bucket):
                if found := waiting.get(key):
                    matches[row] = found.popleft()
    return matches


def buckets_of(rows: int) -> int:
    """How many buckets so many rows take."""
    return min(MAX_BUCKETS, 1 + rows // ROWS_A_BUCKET)


class Spread:
    """Entries spread over bucket files by their key."""

    def __init__(self, entries: Iterable[tuple[bytes, int]], buckets: int, directory: Path) -> None:
        self._files: list[IO[bytes]] = []
        with disk_errors(directory):
            for _ in range(buckets):
                self._files.append(tempfile.TemporaryFile(dir=directory, buffering=BUFFER_BYTES))  # noqa: SIM115
            for key, row in entries:
                self._files[int.from_bytes(key[:4], "little") % buckets].write(_ENTRY.pack(key, row))

    def entries(self, bucket: int) -> Iterator[tuple[bytes, int]]:
        """The bucket's entries in the order in which they were added."""
        self._files[bucket].seek(0)
        while block := self._files[bucket].read(_ENTRY.size * 4096):
            yield from _ENTRY.iter_unpack(block)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
