"""`inflight.bin`: which requests are in flight, in a file that survives the process.

It has one slot of 64 bytes for each request that may be in flight, mapped into memory. The page cache keeps it through
`kill -9`; after power loss slots may be missing.
"""

import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from batchrun.durable import disk_errors
from batchrun.money import usd_or_none
from batchrun.records import PossiblyBilled

_FIELDS = struct.Struct("<qi16sqq?")
"""row, attempt, request_key, upper bounds in 10⁻¹² USD (−1: price unknown) and in tokens (−1: unknown), has_id."""
_CRC = struct.Struct("<I")
SLOT_BYTES = 64
_EMPTY = bytes(SLOT_BYTES)
_SLOT = struct.Struct(f"<{_FIELDS.size}sI{SLOT_BYTES - _FIELDS.size - _CRC.size}x")


class NamedRequest(NamedTuple):
    """A request that a slot names, so its end is unknown. `row` is −1 if the slot can't be read. `has_id`: our id was
    sent with it.
    """

    row: int
    n: int
    key: bytes
    upper_bound_pico_usd: int | None
    upper_bound_tokens: int | None
    has_id: bool = False


UNREADABLE = NamedRequest(-1, 0, b"", None, None)


class InFlightFile:
    """The open slot file. Close it."""

    def __init__(self, path: Path, count: int, *, with_ids: bool = False) -> None:
        """Opens a file of `count` empty slots. It overwrites an earlier file: read that first.

        `with_ids`: our ids are sent with the attempts. Each slot says so, because a reader after a crash may have
        another job, or none.
        """
        self._with_ids = with_ids
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.posix_fallocate(self._file, 0, count * SLOT_BYTES)  # a sparse file could fail later, with a SIGBUS
            self._map = mmap.mmap(self._file, count * SLOT_BYTES)

    def occupy(
        self,
        slot: int,
        row: int,
        n: int,
        key: bytes,
        upper_bound_pico_usd: int | None,
        upper_bound_tokens: int | None,
    ) -> None:
        """Writes the attempt into the slot. Call it before the request goes to the socket."""
        pico_usd = -1 if upper_bound_pico_usd is None else upper_bound_pico_usd
        tokens = -1 if upper_bound_tokens is None else upper_bound_tokens
        fields = _FIELDS.pack(row, n, key, pico_usd, tokens, self._with_ids)
        _SLOT.pack_into(self._map, slot * SLOT_BYTES, fields, zlib.crc32(fields))

    def clear(self, slot: int) -> None:
        """Empties the slot. Call it after the commit of the attempt's ending."""
        start = slot * SLOT_BYTES
        self._map[start : start + SLOT_BYTES] = _EMPTY

    def clear_all(self) -> None:
        """Empties all slots. Call it after their attempts were listed as possibly billed."""
        self._map[:] = bytes(len(self._map))

    def occupied(self) -> list[NamedRequest]:
        """The requests that are in flight now, read from the file."""
        return list(_occupied(self._map[:]))

    def close(self) -> None:
        self._map.close()
        os.close(self._file)


def read(path: Path) -> list[NamedRequest]:
    """The requests that were in flight when the process died; none if there is no file."""
    with disk_errors(path):
        return list(_occupied(path.read_bytes())) if path.exists() else []


def possibly_billed(lost: Sequence[NamedRequest], invocation: int, cause: str, prefix: str) -> list[PossiblyBilled]:
    """The requests as entries of the permanent list; `prefix` is the start of the ids that they were sent with."""
    return [
        PossiblyBilled(
            row=entry.row,
            n=entry.n,
            key=entry.key.hex(),
            upper_bound_usd=usd_or_none(entry.upper_bound_pico_usd),
            upper_bound_tokens=entry.upper_bound_tokens,
            cause=cause,
            invocation=invocation,
            request_id=f"{prefix}-{entry.row}-{entry.n}" if entry.has_id else None,
        )
        for entry in lost
    ]


def _occupied(content: bytes) -> Iterator[NamedRequest]:
    """The requests that the slots name. A slot that a crash left half written is one request that no one can name."""
    for start in range(0, len(content), SLOT_BYTES):
        slot = content[start : start + SLOT_BYTES]
        if slot == _EMPTY:
            continue
        fields, crc = slot[: _FIELDS.size], slot[_FIELDS.size : _FIELDS.size + _CRC.size]
        if len(slot) < SLOT_BYTES or crc != _CRC.pack(zlib.crc32(fields)):
            yield UNREADABLE
            continue
        row, n, key, pico_usd, tokens, has_id = _FIELDS.unpack(fields)
        yield NamedRequest(row, n, key, None if pico_usd < 0 else pico_usd, None if tokens < 0 else tokens, has_id)
