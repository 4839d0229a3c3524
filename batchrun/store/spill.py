"""`spill.bin`: endings that arrive after the database has failed; the next start moves them into the database.

After a failed fsync a database is never written again: the next fsync may report success for pages that the kernel has
dropped.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from batchrun.durable import disk_errors, fsync
from batchrun.errors import CheckpointError
from batchrun.records import CompletionRecord, Discarded, Ending

_HEAD = struct.Struct("<II")  # length, CRC-32


class SpillFrame(msgspec.Struct, frozen=True):
    """The endings of one commit, and their invocation."""

    invocation: int
    completions: tuple[CompletionRecord, ...]
    discarded: tuple[Discarded, ...]


def append(path: Path, endings: Sequence[Ending], invocation: int) -> None:
    """Appends the endings durably.

    Raises:
        DiskError: they are not durable.
    """
    completions = tuple(ending for ending in endings if isinstance(ending, CompletionRecord))
    discarded = tuple(ending for ending in endings if isinstance(ending, Discarded))
    payload = msgspec.msgpack.encode(SpillFrame(invocation, completions, discarded))
    with disk_errors(path):
        new = not path.exists()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            file.write(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
            os.fsync(file.fileno())
        if new:
            fsync(path.parent)


def read(path: Path) -> Iterator[SpillFrame]:
    """The frames in the file, none if there is no file. A last frame that is cut was never durable and is left out.

    Raises:
        CheckpointError: a frame before the last is damaged.
    """
    with disk_errors(path):
        content = path.read_bytes() if path.exists() else b""
    place = 0
    while place + _HEAD.size <= len(content):
        length, crc = _HEAD.unpack_from(content, place)
        payload = content[place + _HEAD.size : place + _HEAD.size + length]
        place += _HEAD.size + length
        if zlib.crc32(payload) != crc:
            if place >= len(content):
                return
            raise CheckpointError(f"{path}: damaged; keep a copy of this directory before anything else")
        yield msgspec.msgpack.decode(payload, type=SpillFrame)
