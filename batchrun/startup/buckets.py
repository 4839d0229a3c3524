"""Any number of digests with a number each, spread over buckets so that equal ones are together, in flat memory.

Request keys are kept so with their rows, and ids, of which repeated ones are found.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Self

from batchrun.durable import unnamed_file
from batchrun.errors import DiskError

_ENTRY = struct.Struct("<16sq")

BUFFER_BYTES = 6 << 20
"""Of all buckets together: nothing is on the disk below 262,144 entries."""

ENTRIES_A_BUCKET = 250_000  # a bucket is read into memory at once (docs/scale.md)
MOST_BUCKETS = 1024
"""Each reads and writes blocks of 6 KB then. With more than 256 million entries, buckets get larger."""


class Buckets:
    """Entries (digest of 16 bytes, number) by the digest's first bits. Use it as a context manager.

    What does not fit the buffer goes to one unnamed file in `directory`: one descriptor, 24 bytes an entry.
    """

    def __init__(self, directory: Path, count: int, what: str) -> None:
        """`what` is compared, in words for an error, such as "ids"."""
        self.count = count
        self._what = what
        self._block_bytes = BUFFER_BYTES // count // _ENTRY.size * _ENTRY.size
        self._buffers = [bytearray() for _ in range(count)]
        self._blocks = [array("Q") for _ in range(count)]
        self._written = 0
        self._file = unnamed_file(directory, 0)

    def add(self, digest: bytes, number: int) -> None:
        """Adds the entry.

        Raises:
            DiskError: the disk is full.
        """
        bucket = int.from_bytes(digest[:4], "little") % self.count
        buffer = self._buffers[bucket]
        buffer += _ENTRY.pack(digest, number)
        if len(buffer) >= self._block_bytes:
            self._write(bucket)

    def add_all(self, entries: Iterable[tuple[bytes, int]]) -> None:
        """Adds these entries.

        Raises:
            DiskError: the disk is full.
        """
        for digest, number in entries:
            self.add(digest, number)

    def entries(self, bucket: int) -> Iterator[tuple[bytes, int]]:
        """The bucket's entries in the order in which they were added."""
        for block in self._blocks[bucket]:
            yield from _ENTRY.iter_unpack(os.pread(self._file.fileno(), self._block_bytes, block * self._block_bytes))
        yield from _ENTRY.iter_unpack(self._buffers[bucket])

    def _write(self, bucket: int) -> None:
        rest = memoryview(bytes(self._buffers[bucket]))
        self._buffers[bucket].clear()
        try:
            while rest:  # a write may take a part only
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            why = f"the {self._what} to compare don't fit on the disk: {error.strerror}"
            raise DiskError(f"{why}; free some space") from error
        self._blocks[bucket].append(self._written)
        self._written += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def count_for(entries: int) -> int:
    """How many buckets so many entries take."""
    return min(MOST_BUCKETS, 1 + entries // ENTRIES_A_BUCKET)


ID_BUCKETS = 256  # at 100 million ids, 9 MB of entries are compared at once


class IdIndex(Buckets):
    """The ids of an input: add each with its ordinal, then read the `duplicates`."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, ID_BUCKETS, "ids")

    def add_id(self, ordinal: int, id: object) -> str | None:
        """Adds the id; returns why it is invalid, if it is. 1.2 µs (measured).

        The integer 7 and the string "7" are two ids. `ordinal` must grow from call to call.

        Raises:
            DiskError: the disk is full.
        """
        if isinstance(id, str):
            source = b"s" + id.encode()
        elif isinstance(id, int) and not isinstance(id, bool):
            source = b"i%d" % id
        else:
            return "the id is null" if id is None else f"the id is a {type(id).__name__}, not a string or an integer"
        self.add(blake2b(source, digest_size=16).digest(), ordinal)
        return None

    def duplicates(self) -> Iterator[tuple[int, int]]:
        """(ordinal, ordinal of the first record with the same id) of every repetition, in any order."""
        for bucket in range(self.count):
            first_of: dict[bytes, int] = {}
            for digest, ordinal in self.entries(bucket):
                first = first_of.setdefault(digest, ordinal)
                if first != ordinal:
                    yield ordinal, first
