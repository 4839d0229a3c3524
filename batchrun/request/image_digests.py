"""`images.bin`: what the images of each row were when they were checked, so that a change before the send is noticed.

One entry a row, in row order: BLAKE2b-128 over the digests of its images, and a CRC. An entry that can't be read says
nothing, so a row without images needs none, and a damaged file changes nothing: the question that is sent is always
that of the images that are sent.
"""

import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from batchrun.durable import disk_errors, replacing

_ENTRY = struct.Struct("<16sI")
ENTRY_BYTES = _ENTRY.size


def write(path: Path, entries: Iterable[tuple[bytes, int]]) -> None:
    """The file says (digest, row) of every entry; rows ascend."""
    with (
        replacing(path) as temporary,
        open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
    ):
        for digest, row in entries:
            file.seek(row * _ENTRY.size)
            file.write(_ENTRY.pack(digest, _crc(digest, row)))


class ImageDigests:
    """The digests on record; None for every row where there is no file. Any thread may ask. Close it."""

    def __init__(self, path: Path) -> None:
        with disk_errors(path):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.exists() else None

    def of(self, row: int) -> bytes | None:
        """The digest of the row's images when they were checked, if that is known."""
        if self._file is None:
            return None
        entry = os.pread(self._file, _ENTRY.size, row * _ENTRY.size)
        if len(entry) < _ENTRY.size:
            return None
        digest, crc = _ENTRY.unpack(entry)
        return bytes(digest) if crc == _crc(digest, row) else None

    def close(self) -> None:
        """Nothing is held open."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _crc(digest: bytes, row: int) -> int:
    return zlib.crc32(digest, row & 0xFFFFFFFF)
