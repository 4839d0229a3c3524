"""The checkpoint of a salvaged run: the account of the rows that were kept, and with it all that is still known."""

import contextlib
import shutil
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from batchrun.checkpoint import facts, slots, spill, tables, variants
from batchrun.checkpoint.checkpoint import FORMAT, SINCE, SPILL
from batchrun.checkpoint.database import Database, Record
from batchrun.checkpoint.slots import InFlight
from batchrun.checkpoint.spent import LOST
from batchrun.checkpoint.spill import Frame
from batchrun.checkpoint.tables import Chunk, Reopened
from batchrun.errors import CheckpointError
from batchrun.records import Summary, TotalsLine, Usage
from batchrun.rescue.remains import SALVAGED, Remains
from batchrun.rundir import RunDirectory

_KEPT_FACTS = (facts.ENTRY, "prices", variants.ENTRY, SINCE)  # and not that the run is finished
_TOLD = ("row", "status", "model", "attempts", "cost_usd", "reported_cost_usd")
_COUNTED = [name for name in Usage.__struct_fields__ if name in TotalsLine.__struct_fields__]


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
        self._lines: dict[tuple[str, str], TotalsLine] = {}

    def add(self, own: pa.Table, chunk: Chunk | None, reopened: Sequence[Reopened]) -> None:
        """A chunk is counted: its kept rows as our columns, those among them that are `reopened`, its record."""
        if chunk is not None:
            self.chunks.append(chunk)
        self.reopened += reopened
        pending = {again.row for again in reopened}
        for row in own.select(
            ["row", "status", "model", "attempts", "cost_usd", "reported_cost_usd", *_COUNTED]
        ).to_pylist():
            self.rows += 1
            self.standing[row["status"]] += row["row"] not in pending
            if row["row"] in self._watched:
                self._ended[row["row"]] = row["attempts"]
            key = row["model"], row["status"]
            self._lines[key] = _added(self._lines.get(key) or TotalsLine(0, *key), row)

    def cost_usd(self) -> Decimal:
        """What the kept rows cost."""
        return sum((line.cost_usd for line in self._lines.values()), Decimal(0))

    def totals(self, known: Remains, summary: Sequence[TotalsLine]) -> list[TotalsLine]:
        """The bill as the database has it. Where that is damaged: each line as it, or the summary, had it last; or the
        rows' own sum, as invocation 0, if that is more.
        """
        lines = dict(known.spent.totals)
        if known.whole:
            return list(lines.values())
        for line in summary:
            if line.status == LOST:
                continue  # counted by the list of doubts
            key = line.invocation, line.model, line.status
            lines[key] = max(lines.get(key, line), line, key=lambda line: line.attempts)
        last_known = sum((line.cost_usd for line in lines.values()), Decimal(0))
        return list(self._lines.values() if self.cost_usd() > last_known else lines.values())

    def without_end(self, known: Remains) -> list[InFlight]:
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


def _added(line: TotalsLine, row: dict[str, Any]) -> TotalsLine:
    return msgspec.structs.replace(
        line,
        rows=line.rows + 1,
        attempts=line.attempts + row["attempts"],
        cost_usd=line.cost_usd + (row["cost_usd"] or 0),
        unpriced=line.unpriced + (row["cost_usd"] is None),
        reported_cost_usd=line.reported_cost_usd + (row["reported_cost_usd"] or 0),
        **{name: getattr(line, name) + (row[name] or 0) for name in _COUNTED},
    )


def write(old: RunDirectory, known: Remains, account: Account, new: RunDirectory) -> None:
    """The new directory has a checkpoint that says what was kept; a start goes on with it."""
    invocation = max((record[0] for record in known.invocations), default=1)
    lost = slots.possibly_billed(account.without_end(known), invocation, "crash")
    records: dict[str, list[Record]] = {
        "manifest": [
            (SALVAGED, str(account.rows)),
            *((name, known.manifest[name]) for name in _KEPT_FACTS if name in known.manifest),
        ],
        "invocations": known.invocations,
        "chunks": [msgspec.structs.astuple(chunk) for chunk in account.chunks],
        "attempts": known.attempts,
        "possibly_billed": [tables.possibly_billed_record(doubt) for doubt in (*known.possibly_billed, *lost)],
        "totals": [tables.totals_record(line) for line in account.totals(known, _last_told(old, known))],
        "answered_as": list(known.spent.answered_as.items()),
        "standing": list(account.standing.items()),
        "reopened": [msgspec.structs.astuple(again) for again in account.reopened],
    }
    database = Database.open(new.checkpoint, tables.TABLES, FORMAT, lambda full: False)

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


def _last_told(old: RunDirectory, known: Remains) -> list[TotalsLine]:
    try:
        return msgspec.json.decode(old.summary.read_bytes(), type=Summary).totals
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return []
