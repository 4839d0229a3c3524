"""One integer of 64 bits for each of any number of rows, in a file that is not mapped: pages of a mapped file count as
memory of the process, and would be 80 MB for ten million rows.
"""

import os
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from batchrun.durable import disk_errors

_NUMBER = struct.Struct("=q")
BLOCK_ROWS = 1 << 16


class RowNumbers:
    """The numbers of rows 0 to `rows` - 1. The file stays the caller's."""

    def __init__(self, file: int, rows: int, path: Path) -> None:
        """`file` is a descriptor, open for reading and writing; `path` names it in errors."""
        self._file = file
        self._path = path
        self.rows = rows

    def fill(self, number: int) -> None:
        """Every row has this number; the space on the disk is taken.

        Raises:
            DiskError: there is no room.
        """
        block = _NUMBER.pack(number) * BLOCK_ROWS
        with disk_errors(self._path):
            os.posix_fallocate(self._file, 0, _NUMBER.size * max(self.rows, 1))
            for first in range(0, self.rows, BLOCK_ROWS):
                os.pwrite(self._file, block[: _NUMBER.size * (self.rows - first)], _NUMBER.size * first)

    def __getitem__(self, row: int) -> int:
        (number,) = _NUMBER.unpack(os.pread(self._file, _NUMBER.size, _NUMBER.size * row))
        return int(number)

    def __setitem__(self, row: int, number: int) -> None:
        os.pwrite(self._file, _NUMBER.pack(number), _NUMBER.size * row)

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self.rows, BLOCK_ROWS):
            yield from self.between(first, min(first + BLOCK_ROWS, self.rows))

    def between(self, first_row: int, end_row: int) -> "array[int]":
        """The numbers of these rows."""
        numbers = array("q")
        numbers.frombytes(os.pread(self._file, _NUMBER.size * (end_row - first_row), _NUMBER.size * first_row))
        return numbers
