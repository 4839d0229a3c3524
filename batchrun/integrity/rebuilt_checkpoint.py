"""The checkpoint of a salvaged run: the account of the rows that were kept, and with it all that is still known."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import msgspec
import pyarrow as pa

from batchrun.errors import CheckpointError
from batchrun.integrity.db_records import SALVAGED, DbRecords
from batchrun.records import LineKey, Summary, TotalsLine
from batchrun.store import db_tables, in_flight, manifest, spill, variants
from batchrun.store.checkpoint import FORMAT, SINCE, SPILL
from batchrun.store.database import Database, Record
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.in_flight import InFlight
from batchrun.store.rundir import RunDirectory
from batchrun.store.spill import Frame
from batchrun.store.totals import DISCARDED, FIGURES, LOST, UNSTATED, plus
from batchrun.tables import booked

_KEPT_FACTS = (manifest.ENTRY, "prices", variants.ENTRY, SINCE, UNSTATED)  # and not that the run is finished


class Account:
    """What the kept rows say: which chunks they are in, how they ended, what they cost."""

    def __init__(self, flying: Sequence[InFlight], spilled: Sequence[Frame]) -> None:
        """`flying` were in flight when the old run's last process ended; `spilled` no start has taken in yet."""
        self.chunks: list[Chunk] = []
        self.reopened: list[Reopened] = []
        self.standing: Counter[str] = Counter()
        self.rows = 0
        self._flying = flying
        self._spilled = spilled
        self._watched = {entry.row for entry in flying} | {c.row for frame in spilled for c in frame.completions}
        self._ended: dict[int, int] = {}
        self._answers: dict[LineKey, TotalsLine] = {}
        self._discarded: dict[LineKey, TotalsLine] = {}

    def add(self, own: pa.Table, chunk: Chunk | None, reopened: Sequence[Reopened]) -> None:
        """A chunk is counted: its kept rows as our columns, those among them that are `reopened`, its record."""
        if chunk is not None:
            self.chunks.append(chunk)
        self.reopened += reopened
        pending = {again.row for again in reopened}
        for row, answer in zip(own.select(["row", "attempts", "cost_usd"]).to_pylist(), booked.lines(own), strict=True):
            self.rows += 1
            stands = row["row"] not in pending
            self.standing[answer.status] += stands
            if row["row"] in self._watched:
                self._ended[row["row"]] = row["attempts"]
            _add(self._answers, msgspec.structs.replace(answer, rows=int(stands)))
            beyond = (row["cost_usd"] or answer.cost_usd) - answer.cost_usd
            key = answer.invocation, answer.model, DISCARDED, answer.day
            _add(self._discarded, TotalsLine(*key, attempts=row["attempts"] - answer.attempts, cost_usd=beyond))

    def cost_usd(self) -> Decimal:
        """What the kept rows cost, all their attempts."""
        lines = (*self._answers.values(), *self._discarded.values())
        return sum((line.cost_usd for line in lines), Decimal(0))

    def totals(self, known: DbRecords, summary: Sequence[TotalsLine]) -> list[TotalsLine]:
        """The bill as the database has it. Where that is damaged: as it, or the summary, had it last; or the rows' own
        sum, if that is more.
        """
        if known.whole:
            return list(known.spent.totals.values())
        lines = max((known.spent.lines(), summary), key=lambda lines: sum(line.attempts for line in lines))
        lines = [line for line in lines if line.status != LOST]  # those are counted by the list of doubts
        last_known = sum((line.cost_usd for line in lines), Decimal(0))
        own = [*self._answers.values(), *(line for line in self._discarded.values() if line.attempts)]
        return own if self.cost_usd() > last_known else list(lines)

    def replaced(self, totals: Sequence[TotalsLine]) -> list[TotalsLine]:
        """What has to be added to the totals so that they say: the kept rows' answers stand, the rest is discarded."""
        booked_as = {line.key: line for line in totals if line.status != DISCARDED}
        changes: dict[LineKey, TotalsLine] = {}
        for key in {**booked_as, **self._answers}:
            change = _difference(self._answers.get(key), booked_as.get(key) or TotalsLine(*key))
            _add(changes, change)
            discarded = TotalsLine(change.invocation, change.model, DISCARDED, change.day)
            unbooked = _difference(discarded, change)
            _add(changes, msgspec.structs.replace(unbooked, rows=0, reused=0, duplicates=0, saved_usd=Decimal(0)))
        return list(changes.values())

    def without_end(self, known: DbRecords) -> list[InFlight]:
        """Who was in flight and has no end on record, as the next start would have found."""
        ended = {record[:2] for record in known.attempts if record[-1] >= known.since}
        ended |= {(doubt.row, doubt.n) for doubt in known.possibly_billed if doubt.invocation >= known.since}
        return [
            entry
            for entry in self._flying
            if (entry.row, entry.n) not in ended and self._ended.get(entry.row, -1) < entry.n
        ]

    def still_spilled(self) -> list[Frame]:
        """What was spilled, without the rows that were kept from elsewhere."""
        return [
            msgspec.structs.replace(
                frame, completions=tuple(c for c in frame.completions if self._ended.get(c.row, -1) < c.attempts)
            )
            for frame in self._spilled
        ]


def _add(lines: dict[LineKey, TotalsLine], line: TotalsLine) -> None:
    lines[line.key] = plus(lines.get(line.key) or TotalsLine(*line.key), line)


def _difference(wanted: TotalsLine | None, line: TotalsLine) -> TotalsLine:
    """What makes `wanted` (None: nothing) of the line. Offline counts stay where they are: no row has them."""
    wanted = wanted or TotalsLine(*line.key)
    figures = {name: getattr(wanted, name) - getattr(line, name) for name in FIGURES if not name.startswith("offline_")}
    return TotalsLine(*wanted.key, **figures)


def write(old: RunDirectory, known: DbRecords, account: Account, new: RunDirectory) -> None:
    """The new directory has a checkpoint that says what was kept; a start goes on with it."""
    invocation = max((record[0] for record in known.invocations), default=1)
    lost = in_flight.possibly_billed(account.without_end(known), invocation, "crash")
    told = _last_told(old)
    totals = account.totals(known, [] if told is None else told.totals)
    records: dict[str, list[Record]] = {
        "manifest": [
            (SALVAGED, str(account.rows)),
            *((name, known.manifest[name]) for name in _KEPT_FACTS if name in known.manifest),
        ],
        "invocations": _invocations(known, told),
        "chunks": [msgspec.structs.astuple(chunk) for chunk in account.chunks],
        "attempts": known.attempts,
        "possibly_billed": [db_tables.possibly_billed_record(doubt) for doubt in (*known.possibly_billed, *lost)],
        "totals": [db_tables.totals_record(line) for line in totals],
        "replaced": [db_tables.replaced_record(line, 1) for line in account.replaced(totals)],
        "answered_as": list(known.spent.answered_as.items()),
        "standing": list(account.standing.items()),
        "reopened": [msgspec.structs.astuple(again) for again in account.reopened],
    }
    database = Database.open(new.checkpoint, db_tables.TABLES, FORMAT, lambda full: False)

    def insert() -> None:
        for name, lines in records.items():
            database.insert(name, lines)

    try:
        database.transaction(insert)
    finally:
        database.close()
    for frame in account.still_spilled():
        spill.append(new.checkpoint.with_name(SPILL), (*frame.completions, *frame.discarded), frame.invocation)
    for kept in (old.spool, *old.path.glob("images*.bin")):
        if kept.exists():
            shutil.copyfile(kept, new.path / kept.name)


def spilled(directory: RunDirectory) -> list[Frame]:
    """What was spilled, up to the first frame that can't be read."""
    frames: list[Frame] = []
    with contextlib.suppress(CheckpointError):
        for frame in spill.read(directory.checkpoint.with_name(SPILL)):
            frames.append(frame)  # one by one: those before the damage count
    return frames


def _invocations(known: DbRecords, told: Summary | None) -> list[Record]:
    """The starts on record, and the last one that the summary tells of: the next is the newest, whatever was lost."""
    if told is None or any(record[0] >= told.invocation for record in known.invocations):
        return known.invocations
    return [*known.invocations, (told.invocation, told.started_at.timestamp(), told.pid, told.host, "")]


def _last_told(old: RunDirectory) -> Summary | None:
    try:
        return msgspec.json.decode(old.summary.read_bytes(), type=Summary)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
