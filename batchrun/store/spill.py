"""`spill.bin`: endings that the database could not take, until the next start takes them in.

After one failed fsync a file can't be trusted: the next may report success for pages the kernel has dropped. So a
database that failed is never written again; what still arrives goes into this file of its own, frame by frame, each
durable before it counts.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from batchrun.durable import disk_errors, fsync
from batchrun.errors import CheckpointError
from batchrun.records import Completion, Discarded, Ending

_HEAD = struct.Struct("<II")  # length, CRC-32


class Frame(msgspec.Struct, frozen=True):
    """The endings of one group, and the invocation that they count for."""

    invocation: int
    completions: tuple[Completion, ...]
    discarded: tuple[Discarded, ...]


def append(path: Path, endings: Sequence[Ending], invocation: int) -> None:
    """The endings are durable in the file.

    Raises:
        DiskError: they are not.
    """
    completions = tuple(ending for ending in endings if isinstance(ending, Completion))
    discarded = tuple(ending for ending in endings if isinstance(ending, Discarded))
    payload = msgspec.msgpack.encode(Frame(invocation, completions, discarded))
    with disk_errors(path):
        new = not path.exists()
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab", buffering=0) as file:
            file.write(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
            os.fsync(file.fileno())
        if new:
            fsync(path.parent)


def read(path: Path) -> Iterator[Frame]:
    """The frames in the file, none where there is none. A last frame that is not whole was never durable.

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
        yield msgspec.msgpack.decode(payload, type=Frame)
