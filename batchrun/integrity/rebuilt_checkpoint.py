"""The checkpoint of a salvaged run: totals of the rows that were kept, and everything else that is still known."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import msgspec
import pyarrow as pa

from batchrun.errors import CheckpointError
from batchrun.integrity.db_records import SALVAGED, DbRecords
from batchrun.report.summary import read_or_none
from batchrun.run_summary import LineKey, TotalsLine
from batchrun.store import db_tables, in_flight, price_tables, spill, variants
from batchrun.store.checkpoint import write_new
from batchrun.store.commits import SPILL
from batchrun.store.database import Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.in_flight import NamedRequest
from batchrun.store.ledger import SINCE
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.spill import SpillFrame
from batchrun.store.totals import DISCARDED, LOST, UNSTATED, negative, plus
from batchrun.tables import booked

_KEPT_ENTRIES = (Manifest.ENTRY, price_tables.ENTRY, variants.ENTRY, SINCE, UNSTATED)
"""Not among them: that the run is finished."""


class KeptSums:
    """The sums over the kept rows: their chunks, their statuses, their cost."""

    def __init__(self, named: Sequence[NamedRequest], spilled: Sequence[SpillFrame]) -> None:
        """`named` were in flight when the old run's last process ended; no start has stored `spilled` yet."""
        self.spilled = spilled
        self.chunks: list[Chunk] = []
        self.reopened: list[Reopened] = []
        self.standing: Counter[str] = Counter()
        self.rows = 0
        self._named = named
        self._watched = {entry.row for entry in named} | {c.row for frame in spilled for c in frame.completions}
        self._ended: dict[int, int] = {}
        self._answers: dict[LineKey, TotalsLine] = {}
        self._discarded: dict[LineKey, TotalsLine] = {}

    def add(self, own: pa.Table, chunk: Chunk | None, reopened: Sequence[Reopened]) -> None:
        """Counts a chunk: its kept rows as our columns, those among them that are `reopened`, its record."""
        if chunk is not None:
            self.chunks.append(chunk)
        self.reopened += reopened
        pending = {again.row for again in reopened}
        for row, answer in zip(own.select(["row", "attempts", "cost_usd"]).to_pylist(), booked.lines(own), strict=True):
            self.rows += 1
            is_kept = row["row"] not in pending
            self.standing[answer.status] += is_kept
            if row["row"] in self._watched:
                self._ended[row["row"]] = row["attempts"]
            _add(self._answers, msgspec.structs.replace(answer, rows=int(is_kept)))
            beyond = (row["cost_usd"] or answer.cost_usd) - answer.cost_usd
            key = answer.invocation, answer.model, DISCARDED, answer.day, answer.service_tier
            _add(self._discarded, TotalsLine(*key, attempts=row["attempts"] - answer.attempts, cost_usd=beyond))

    def cost_usd(self) -> Decimal:
        """The cost of the kept rows, including all their attempts."""
        lines = (*self._answers.values(), *self._discarded.values())
        return sum((line.cost_usd for line in lines), Decimal(0))

    def totals(self, known: DbRecords, summary: Sequence[TotalsLine]) -> list[TotalsLine]:
        """The database's totals. If it is damaged: the last known ones, from it or from the summary, or the sum of the
        rows if that is more.
        """
        if known.whole:
            return list(known.totals.booked.values())
        lines = max((known.totals.lines(), summary), key=lambda lines: sum(line.attempts for line in lines))
        lines = [line for line in lines if line.status != LOST]  # `possibly_billed` counts those
        last_known = sum((line.cost_usd for line in lines), Decimal(0))
        own = [*self._answers.values(), *(line for line in self._discarded.values() if line.attempts)]
        return own if self.cost_usd() > last_known else list(lines)

    def replaced(self, totals: Sequence[TotalsLine]) -> list[TotalsLine]:
        """The lines to add to the totals so that they count the kept rows' answers, and the rest as discarded."""
        booked_as = {line.key: line for line in totals if line.status != DISCARDED}
        changes: dict[LineKey, TotalsLine] = {}
        for key in {**booked_as, **self._answers}:
            change = _difference(self._answers.get(key), booked_as.get(key) or TotalsLine(*key))
            _add(changes, change)
            discarded = TotalsLine(change.invocation, change.model, DISCARDED, change.day, change.service_tier)
            unbooked = _difference(discarded, change)
            _add(changes, msgspec.structs.replace(unbooked, rows=0, reused=0, duplicates=0, saved_usd=Decimal(0)))
        return list(changes.values())

    def without_known_end(self, known: DbRecords) -> list[NamedRequest]:
        """Requests in flight without a recorded end, as the next start would have found them."""
        ended = {record[:2] for record in known.attempts if record[-1] >= known.since}
        ended |= {(doubt.row, doubt.n) for doubt in known.possibly_billed if doubt.invocation >= known.since}
        return [
            entry for entry in self._named if (entry.row, entry.n) not in ended and not self.is_kept(entry.row, entry.n)
        ]

    def is_kept(self, row: int, attempts: int) -> bool:
        """Whether a row is kept that ended with this attempt or a later one."""
        return self._ended.get(row, -1) >= attempts


def _add(lines: dict[LineKey, TotalsLine], line: TotalsLine) -> None:
    lines[line.key] = plus(lines.get(line.key) or TotalsLine(*line.key), line)


def _difference(wanted: TotalsLine | None, line: TotalsLine) -> TotalsLine:
    """`wanted` (None: nothing) minus the line. Offline counts stay, because no row has them."""
    change = plus(wanted or TotalsLine(*line.key), negative(line))
    return msgspec.structs.replace(change, offline_prompt_tokens=0, offline_completion_tokens=0)


def write(old: RunDirectory, known: DbRecords, account: KeptSums, new: RunDirectory) -> None:
    """Writes the checkpoint of the new directory, which a start resumes."""
    invocation = max((record[0] for record in known.invocations), default=1)
    prefix = Manifest.decode(known.manifest).attempt_prefix
    lost = in_flight.possibly_billed(account.without_known_end(known), invocation, "crash", prefix)
    last = read_or_none(old)
    invocations = known.invocations
    if last is not None and all(record[0] < last.invocation for record in invocations):
        # its start is not on record, and the next start must have the highest number
        started = (last.invocation, last.started_at.timestamp(), last.pid, last.host, "")
        invocations = [*invocations, started]
    totals = account.totals(known, [] if last is None else last.totals)
    records: dict[str, list[Record]] = {
        "manifest": [
            (SALVAGED, str(account.rows)),
            *((name, known.manifest[name]) for name in _KEPT_ENTRIES if name in known.manifest),
        ],
        "invocations": invocations,
        "chunks": [msgspec.structs.astuple(chunk) for chunk in account.chunks],
        "attempts": known.attempts,
        "possibly_billed": [db_tables.possibly_billed_record(doubt) for doubt in (*known.possibly_billed, *lost)],
        "totals": [db_tables.totals_record(line) for line in totals],
        "replaced": [db_tables.replaced_record(line, 1) for line in account.replaced(totals)],
        "answered_as": list(known.totals.answered_as.items()),
        "standing": list(account.standing.items()),
        "reopened": [msgspec.structs.astuple(again) for again in account.reopened],
    }
    write_new(new.checkpoint, records)
    for frame in account.spilled:  # without rows that were kept from elsewhere
        left = (answer for answer in frame.completions if not account.is_kept(answer.row, answer.attempts))
        spill.append(new.checkpoint.with_name(SPILL), (*left, *frame.discarded), frame.invocation)
    for kept in (old.spool, *old.path.glob("images*.bin")):
        if kept.exists():
            shutil.copyfile(kept, new.path / kept.name)


def spilled(directory: RunDirectory) -> list[SpillFrame]:
    """The spilled answers, up to the first frame that can't be read."""
    frames: list[SpillFrame] = []
    with contextlib.suppress(CheckpointError):
        for frame in spill.read(directory.checkpoint.with_name(SPILL)):
            frames.append(frame)  # one by one: those before the damage count
    return frames
