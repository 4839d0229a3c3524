"""Matches new rows with old answers by request key: the k-th row of a key gets the k-th answer to it.

Memory is flat for any number of rows: both sides are spread over buckets and matched bucket by bucket.
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

from batchrun.durable import unnamed_file
from batchrun.startup import buckets
from batchrun.startup.buckets import Buckets
from batchrun.store.row_numbers import RowNumbers

NONE = -1
"""The old row of a new request."""

KEYS = "request keys"

BUFFER_BYTES = 1 << 16  # 2,730 entries a write

_ENTRY = struct.Struct("<16sq")


class Matches(RowNumbers):
    """For each new row, in order, the old row whose answer it takes, or `NONE`. Close it."""

    def __init__(self, rows: int, directory: Path) -> None:
        self._unnamed = unnamed_file(directory)
        super().__init__(self._unnamed.fileno(), rows, directory)
        self.fill(NONE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unnamed.close()


class Questions:
    """A digest of each record by ordinal, in a file without a name: its request key, or the digest of its images."""

    def __init__(self, directory: Path) -> None:
        self._file = unnamed_file(directory, BUFFER_BYTES)

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
    count = buckets.count_for(rows)
    matches = Matches(rows, directory)
    with Buckets(directory, count, KEYS) as answers, Buckets(directory, count, KEYS) as questions:
        answers.add_all(old)
        questions.add_all(new)
        for bucket in range(count):
            waiting: dict[bytes, deque[int]] = {}
            for key, row in answers.entries(bucket):
                waiting.setdefault(key, deque()).append(row)
            for key, row in questions.entries(bucket):
                if found := waiting.get(key):
                    matches[row] = found.popleft()
    return matches
