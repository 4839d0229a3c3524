"""A lease: money of a shared budget that one process may spend, in a small memory-mapped file.

The page cache keeps the file through `kill -9`. The kernel drops the lock on it when the process dies, so any other
process can see that it is dead, and read what it had spent. `budget_file` has the leases of all processes.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

_STATE = struct.Struct("<QQQQ")
"""Version of the record; amounts spent, in doubt and reserved, in 10⁻¹² USD: up to 18 million USD."""
_CRC = struct.Struct("<I")
SLOT_BYTES = 64


class Period(msgspec.Struct, frozen=True):
    """The day and the month, in the budget's time zone, in which money is spent: `2026-11-28`, `2026-11`."""

    day: str
    month: str


class Spending(msgspec.Struct, frozen=True):
    """How much of a lease is used, in 10⁻¹² USD. Replaced as a whole, so any thread may read it."""

    spent: int = 0
    in_doubt: int = 0
    reserved: int = 0

    @property
    def used(self) -> int:
        return self.spent + self.in_doubt + self.reserved


class Lease:
    """Money that this process may spend in one period. One thread at a time, except `spending`."""

    def __init__(self, path: Path, period: Period) -> None:
        """Makes the lease's file and locks it."""
        self.path = path
        self.period = period
        self.spending = Spending()
        self.granted = 0  # 10⁻¹² USD
        self.booked = Spending()  # the part of it that `windows` holds
        self._version = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, 2 * SLOT_BYTES)
            self._map = mmap.mmap(self._file, 2 * SLOT_BYTES)
        except BaseException:
            os.close(self._file)
            raise
        self._write(Spending())

    @property
    def name(self) -> str:
        """The lease's key in the table."""
        return self.path.suffix.removeprefix(".")

    def covers(self, bound_pico_usd: int) -> bool:
        """Whether so much can be reserved."""
        return self.granted - self.spending.used >= bound_pico_usd

    @property
    def left_pico_usd(self) -> int:
        """What can still be reserved. Below 0 where answers cost more than their bounds."""
        return self.granted - self.spending.used

    def since(self, before: Spending) -> tuple[int, int]:
        """10⁻¹² USD that were spent, and that are in doubt, since then."""
        now = self.spending
        return now.spent - before.spent, now.in_doubt - before.in_doubt

    @property
    def is_idle(self) -> bool:
        """True while nothing is reserved."""
        return not self.spending.reserved

    def reserve(self, bound_pico_usd: int) -> None:
        """The most that a request may cost is set aside; to be called before it is sent."""
        now = self.spending
        self._write(Spending(now.spent, now.in_doubt, now.reserved + bound_pico_usd))

    def settle(self, bound_pico_usd: int, spent_pico_usd: int | None) -> None:
        """The reservation has become what was spent. None, an unknown cost, leaves all of it in doubt."""
        now = self.spending
        spent, doubt = (0, bound_pico_usd) if spent_pico_usd is None else (spent_pico_usd, 0)
        self._write(Spending(now.spent + spent, now.in_doubt + doubt, now.reserved - bound_pico_usd))

    def shrink(self) -> None:
        """Gives up the unused rest, so that it can be given back."""
        self.granted = min(self.granted, self.spending.used)

    def close(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)
        self._map.close()
        os.close(self._file)

    def _write(self, spending: Spending) -> None:
        """Writes the two slots in turn: a kill during a write leaves the other one intact."""
        self._version += 1
        fields = _STATE.pack(self._version, spending.spent, spending.in_doubt, spending.reserved)
        start = self._version % 2 * SLOT_BYTES
        self._map[start : start + _STATE.size + _CRC.size] = fields + _CRC.pack(zlib.crc32(fields))
        self.spending = spending


def last_spending(path: Path) -> Spending | None:
    """The newer of a dead process's two records; None if neither can be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    newest: tuple[int, Spending] | None = None
    for start in (0, SLOT_BYTES):
        fields = content[start : start + _STATE.size]
        if content[start + _STATE.size : start + _STATE.size + _CRC.size] != _CRC.pack(zlib.crc32(fields)):
            continue
        version, *amounts = _STATE.unpack(fields)
        if newest is None or version > newest[0]:
            newest = version, Spending(*amounts)
    return None if newest is None else newest[1]


@contextlib.contextmanager
def if_dead(path: Path) -> Iterator[bool]:
    """Whether the lease's process is dead; if so, holds its lock while the block lasts."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
