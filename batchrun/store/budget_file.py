"""`budget.db`: what the runs of a budget have spent by day and month, for any number of processes.

A process spends only from its **lease**: an amount that one transaction sets aside for it before it spends any. So a
request costs no transaction, and all leases and all spending together stay within the caps. How much of the lease is
spent, and how much is reserved for requests in flight, is in the lease's own file (`budget_lease`). After a process has
died, the next one that draws money books what the dead one spent, counts what it had in flight as possibly billed, and
takes back the rest.
"""

import contextlib
import glob
import os
import secrets
import socket
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.durable import disk_errors
from batchrun.errors import DiskError, JobError
from batchrun.money import to_pico, to_usd
from batchrun.store.budget_lease import Lease, Period, Spending, if_dead, last_spending
from batchrun.store.database import Database
from batchrun.store.rundir import NETWORK_FILE_SYSTEMS, file_system

TABLES = """
CREATE TABLE windows (budget TEXT, period TEXT, spent_usd TEXT, in_doubt_usd TEXT, crc INTEGER,
    PRIMARY KEY (budget, period)) WITHOUT ROWID;
CREATE TABLE leases (lease TEXT PRIMARY KEY, budget TEXT, day TEXT, month TEXT, granted_usd TEXT, spent_usd TEXT,
    in_doubt_usd TEXT, boot TEXT, pid INTEGER, host TEXT, directory TEXT, crc INTEGER) WITHOUT ROWID;
"""
FORMAT = 1

BLOCKS = 50
"""A lease grows by one of so many parts of the cap, so a cap takes about this many transactions."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Identifies the present boot on Linux (random(4)); other systems have no such file."""


class Caps(msgspec.Struct, frozen=True):
    """10⁻¹² USD that may be spent in a day and in a month; None: no cap."""

    day: int | None
    month: int | None


class Use(msgspec.Struct, frozen=True):
    """What is used of one cap: certainly spent, in doubt (possibly billed), and held by leases of other processes;
    in 10⁻¹² USD.
    """

    period: str
    cap: int
    spent: int
    in_doubt: int
    held: int

    @property
    def left(self) -> int:
        """What is not used, whoever holds it."""
        return self.cap - self.spent - self.in_doubt


class Drawn(msgspec.Struct, frozen=True):
    """What one transaction gave in 10⁻¹² USD, 0 where too little is left, and what is used of each cap.

    `can_come`: other processes hold so much that enough may yet come back.
    """

    granted: int
    uses: tuple[Use, ...]
    can_come: bool


class BudgetFile:
    """The open file, for one budget by its name. Any thread, one at a time. Close it."""

    def __init__(self, path: Path, budget: str, caps: Caps, directory: Path) -> None:
        """`directory` is the run's, for people who look into the file.

        Raises:
            CheckpointError: the file is damaged, or of another version.
            DiskError: it can't be made or opened.
        """
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._budget = budget
        self._caps = caps
        self._directory = str(directory)
        self._boot = boot_id()
        self._database = Database.open_shared(path, TABLES, FORMAT)
        self._inode = path.stat().st_ino

    def lease(self, period: Period) -> Lease:
        """A new lease, of nothing yet."""
        with self._database.committed():
            with disk_errors(self._path):
                self._remove_orphans()
                lease = Lease(self._file_of(secrets.token_hex(8)), period)
            self._put(lease)
        return lease

    def draw(self, lease: Lease, need: int) -> Drawn:
        """Grants `need`, or more if there is plenty, or nothing. Books this lease and those of the dead first.

        The caller adds what was granted to `lease.granted`, in the thread that reserves.
        """
        with self._booking(lease):
            # SQLite keeps working in a deleted file, while other processes start a new one with nothing spent
            if not self._path.exists() or self._path.stat().st_ino != self._inode:
                raise DiskError(
                    f"{self._path}: was deleted or replaced; nothing more is sent; run the same command again"
                )
            dead = list(self._take_back_from_dead())
            self._book(lease)
            drawn = self._granted(lease, need)
            if drawn.granted:
                self._put(lease, more=drawn.granted)
        for path in dead:
            path.unlink(missing_ok=True)
        return drawn

    def give_back(self, lease: Lease) -> None:
        """Makes what `lease.shrink` gave up available to others."""
        with self._booking(lease):
            self._book(lease)
            self._put(lease)

    def end(self, lease: Lease) -> None:
        """Books what was spent, and what is still reserved as in doubt; frees the rest. Closes the lease."""
        with self._booking(lease):
            now = lease.spending
            lease.spending = Spending(now.spent, now.in_doubt + now.reserved)
            self._book(lease)
            self._database.query("DELETE FROM leases WHERE lease = ?", (lease.name,))
        lease.close()

    def close(self) -> None:
        """Closes the file. Leases that were not ended count as those of a dead process."""
        self._database.close()

    @contextlib.contextmanager
    def _booking(self, lease: Lease) -> Iterator[None]:
        """What the block writes is durable as a whole; else the lease counts as booked as far as it was before."""
        booked = lease.booked
        try:
            with self._database.committed():
                yield
        except BaseException:
            lease.booked = booked
            raise

    def _granted(self, lease: Lease, need: int) -> Drawn:
        """How much more the lease gets; the caller records it."""
        others = [held for held in self._leases() if held.lease != lease.name]
        own = lease.granted - lease.spending.spent - lease.spending.in_doubt
        uses: list[Use] = []
        for period, cap in ((lease.period.day, self._caps.day), (lease.period.month, self._caps.month)):
            if cap is None:
                continue
            spent, doubt = self._window(self._budget, period)
            held = sum(each.open for each in others if period in (each.day, each.month))
            uses.append(Use(period, cap, spent, doubt, held))
        free = min((use.left - use.held for use in uses), default=0) - own
        if free < need:
            can_come = all(use.left - own >= need for use in uses)
            return Drawn(0, tuple(uses), can_come)
        block = min(min(use.cap for use in uses) // BLOCKS, free // (2 * (len(others) + 1)))
        return Drawn(max(need, min(block, free)), tuple(uses), can_come=True)

    def _book(self, lease: Lease) -> None:
        """Adds what the lease spent since the last booking to its windows."""
        now, before = lease.spending, lease.booked
        self._add(self._budget, lease.period, now.spent - before.spent, now.in_doubt - before.in_doubt)
        if now.spent != before.spent or now.in_doubt != before.in_doubt:
            lease.booked = Spending(now.spent, now.in_doubt)
            self._put(lease)

    def _take_back_from_dead(self) -> Iterator[Path]:
        """Ends the leases of dead processes: books their spending, and what was in flight as in doubt.

        Yields their files, which must stay until the transaction is durable.
        """
        for held in self._leases():
            path = self._file_of(held.lease)
            with if_dead(path) as is_dead:
                if not is_dead:
                    continue
                spending = last_spending(path) if held.boot == self._boot else None
                booked = to_pico(Decimal(held.spent_usd)), to_pico(Decimal(held.in_doubt_usd))
                if spending is None:  # after a power loss the file may be an old one: all that was granted is in doubt
                    spent, doubt = 0, max(0, to_pico(Decimal(held.granted_usd)) - sum(booked))
                else:
                    spent, doubt = spending.spent - booked[0], spending.in_doubt + spending.reserved - booked[1]
                self._add(held.budget, Period(held.day, held.month), spent, doubt)
                self._database.query("DELETE FROM leases WHERE lease = ?", (held.lease,))
                yield path

    def _remove_orphans(self) -> None:
        """Removes files of dead processes whose lease is not in the table."""
        known = {held.lease for held in self._leases()}
        for path in self._path.parent.glob(f"{glob.escape(self._path.name)}-lease.*"):
            with if_dead(path) as is_dead:
                if is_dead and path.suffix.removeprefix(".") not in known:
                    path.unlink(missing_ok=True)

    def _file_of(self, lease: str) -> Path:
        return self._path.with_name(f"{self._path.name}-lease.{lease}")

    def _add(self, budget: str, period: Period, spent: int, doubt: int) -> None:
        """Adds 10⁻¹² USD to the windows of the day and of the month."""
        if not spent and not doubt:
            return
        for name in (period.day, period.month):
            before, doubted = self._window(budget, name)
            after = str(to_usd(before + spent)), str(to_usd(doubted + doubt))
            self._database.replace("windows", [(budget, name, *after)])

    def _window(self, budget: str, period: str) -> tuple[int, int]:
        """10⁻¹² USD spent and in doubt in a day or month."""
        found = self._database.records("windows", "WHERE budget = ? AND period = ?", (budget, period))
        for _, _, spent, doubt in found:
            return to_pico(Decimal(spent)), to_pico(Decimal(doubt))
        return 0, 0

    def _leases(self) -> "list[_Held]":
        return [_Held(*record) for record in self._database.records("leases")]

    def _put(self, lease: Lease, more: int = 0) -> None:
        """Writes the lease into the table, with `more` granted."""
        granted = max(lease.granted, lease.spending.used) + more  # an answer may cost more than its bound
        booked = lease.booked
        amounts = (str(to_usd(amount)) for amount in (granted, booked.spent, booked.in_doubt))
        who = self._boot, os.getpid(), socket.gethostname(), self._directory
        self._database.replace(
            "leases", [(lease.name, self._budget, lease.period.day, lease.period.month, *amounts, *who)]
        )


class _Held(msgspec.Struct, frozen=True):
    """A lease as the table has it."""

    lease: str
    budget: str
    day: str
    month: str
    granted_usd: str
    spent_usd: str
    in_doubt_usd: str
    boot: str
    pid: int
    host: str
    directory: str

    @property
    def open(self) -> int:
        """What is granted and not booked yet, in 10⁻¹² USD."""
        return to_pico(Decimal(self.granted_usd) - Decimal(self.spent_usd) - Decimal(self.in_doubt_usd))


def require_possible(path: Path) -> None:
    """Returns if a budget can be kept in the file at `path`. Makes nothing.

    Raises:
        JobError: it can't be made or written, or lies on a network file system, whose locks don't hold.
    """
    there = path.absolute().parent
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir() or path.is_dir():
        raise JobError(f"budget.state: {path}: a file or directory is in the way; name another file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise JobError(f"budget.state: {path}: can't be written; name another file")
    if (kind := file_system(there)) in NETWORK_FILE_SYSTEMS:
        raise JobError(f"budget.state: {path}: lies on a network file system ({kind}); name a local file")


def boot_id() -> str:
    """The id of the present boot; "" if the system has none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
