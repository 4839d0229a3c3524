"""Figures that a run keeps twice must agree: rows by status, cost, summary.json, usage.parquet, the result's footer."""

import contextlib
from collections import Counter
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from batchrun.errors import CheckpointError
from batchrun.integrity import readable_groups
from batchrun.integrity.db_records import SALVAGED, DbRecords
from batchrun.money import to_usd
from batchrun.records import Status
from batchrun.report.summary import Moment, summarise
from batchrun.run_summary import Summary, TotalsLine
from batchrun.store import db_tables, result
from batchrun.store.ledger import SINCE
from batchrun.store.manifest import Manifest
from batchrun.store.price_tables import Tables
from batchrun.store.rundir import RunDirectory
from batchrun.tables import booked, files
from batchrun.tables.rows import USAGE_COLUMNS

RATE_STEP = 0.1
"""Rates are rounded to this, and `elapsed_s` to a thousandth, so a rate computed from them is not more exact."""


class RowSums(msgspec.Struct):
    """The sums of the rows that can be read."""

    standing: Counter[str] = msgspec.field(default_factory=Counter)
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0

    def add(self, statuses: Iterable[str], costs: Iterable[Decimal | None]) -> None:
        for status, cost in zip(statuses, costs, strict=True):
            self.standing[status] += 1
            self.unpriced += cost is None
            self.cost_usd += cost or 0


def unaccounted_usd(known: DbRecords, sums: RowSums) -> tuple[Decimal, bool]:
    """The cost that neither the rows nor the attempts of pending rows explain, and whether it should be 0.

    It may be more if answers were replaced, given up or lost, or if a row's cost is unknown.
    """
    pending = [chunk for chunk in known.chunks if chunk.open and not chunk.generation]
    waiting = [
        attempt.cost_pico_usd or 0
        for attempt in map(db_tables.discarded, (record for record in known.attempts if record[-1] >= known.since))
        if attempt.row not in known.rows and any(chunk.first_row <= attempt.row < chunk.end_row for chunk in pending)
    ]
    replaced = bool(known.reopened) or any(chunk.generation > 1 for chunk in known.chunks)
    replaced |= SALVAGED in known.manifest or SINCE in known.manifest
    beyond = known.totals.cost_usd() - sums.cost_usd - to_usd(sum(waiting))
    return beyond, not (replaced or sums.unpriced)


def rows_due(known: DbRecords) -> int:
    """The rows of a finished run; a pilot has fewer than the input."""
    return sum(chunk.rows for chunk in known.chunks)


def totals_problem(known: DbRecords, sums: RowSums, *, finished: bool) -> str | None:
    """How the totals disagree with the rows; None if they agree. Every row must have been read."""
    standing = {status: rows for status, rows in known.totals.standing.items() if rows}
    if standing != sums.standing or (finished and sums.standing.total() != rows_due(known)):
        return f"its totals count {standing or 'no row'}, the rows say {dict(sums.standing) or 'none'}"
    beyond, exact = unaccounted_usd(known, sums)
    if beyond < 0 or (exact and beyond):
        return f"its totals say ${known.totals.cost_usd():,.12f}, the rows {'less' if beyond > 0 else 'more'}"
    return None


def usage_problem(directory: RunDirectory, known: DbRecords) -> str | None:
    """The error in the usage.parquet of a finished run; None if it has the totals' lines."""
    usage = result.finished(known.manifest).beside[-1]
    try:
        files.require_digest(directory.usage, usage.digest)
        tables = [table.to_pylist() for table in readable_groups.columns(directory.usage, USAGE_COLUMNS.names)]
    except CheckpointError as error:
        return str(error).removeprefix(f"{directory.usage}: ")
    lines = booked.totals_of([row for rows in tables for row in rows])
    return None if _in_order(lines) == _in_order(known.totals.lines()) else "does not have the totals' lines"


def footer_problem(directory: RunDirectory, known: DbRecords, manifest: Manifest) -> str | None:
    """How the footer of an intact result disagrees with the totals; None if it agrees."""
    footer = files.read_footer(directory.completions) or {}
    found = footer.get("run_id"), footer.get("rows_in_output"), footer.get("cost_usd")
    if found == (manifest.run_id, rows_due(known), str(known.totals.cost_usd())):
        return None
    return "its footer is of run {}, {} rows, ${}".format(*found)


class BillElsewhere(msgspec.Struct, frozen=True):
    """The figures of the whole run in one of its files, if the database has none."""

    place: str
    rows: int
    usd: Decimal


def bill_without_database(directory: RunDirectory) -> BillElsewhere | None:
    """The figures in the result's footer, else in summary.json; None if neither can be read."""
    found: tuple[Path, object, object] | None = None
    if directory.completions.exists():
        with contextlib.suppress(CheckpointError):
            footer = files.read_footer(directory.completions) or {}
            found = directory.completions, footer.get("rows_in_output"), footer.get("cost_usd")
    if found is None or found[1] is None:
        summary = directory.read_summary() or {}
        found = directory.summary, summary.get("rows_in_output"), summary.get("cost_usd")
    place, rows, usd = found
    if not isinstance(rows, int) or not isinstance(usd, str):
        return None
    return BillElsewhere(place.name, rows, Decimal(usd))


def summary_problem(directory: RunDirectory, known: DbRecords, manifest: Manifest, prices: Tables) -> str | None:
    """The error in summary.json. The figures of an incomplete run may be seconds old and are not checked.

    `updated_at`, `last_answer_at`, `requests_per_minute`, `limits`, `tuned`, `deadline`, `command` and, to its
    rounding, `elapsed_s` have no second source.
    """
    if SALVAGED in known.manifest and not directory.summary.exists():
        return None  # no start has resumed it yet
    try:
        content = directory.summary.read_bytes()
        summary = msgspec.json.decode(content, type=Summary)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        return f"can't be read: {error}"
    if summary.to_json() != content:
        return "was changed since it was written"
    if summary.run_id not in ("", manifest.run_id):
        return f"is of run {summary.run_id}, this is {manifest.run_id}"
    if result.FINISHED not in known.manifest:
        return "says complete, and the run is not" if summary.complete else None
    if not summary.complete:
        return None  # the process died between its last two steps
    kept: dict[str, Any] = {name: getattr(summary, name) for name in _BESIDE_TOTALS}
    moment = Moment(now=summary.updated_at, sent=0, **kept)
    counted = summarise(manifest, rows_due(known), prices, known.totals, moment, directory)
    wrong = [name for name in Summary.__struct_fields__ if not _agrees(name, summary, counted, known)]
    return f"{', '.join(wrong)}: not as in checkpoint.db" if wrong else None


_BESIDE_TOTALS = (
    *("state", "invocation", "started_at", "elapsed_s", "limited_by", "pid", "host", "complete"),
    *("tags", "budgets"),
)
"""Fields that the totals do not give; `_agrees` checks those that another record has."""
_NOWHERE_ELSE = frozenset(
    {
        *("limits", "tuned", "deadline", "command", "example_error"),
        *("unknown_finish_reasons", "unpriced_tiers", "unpriced_usage"),
    }
)
"""Fields without a second source."""


def _agrees(name: str, summary: Summary, again: Summary, known: DbRecords) -> bool:
    """Whether a field of the summary is right; `again` is made of the database's records."""
    written: Any = getattr(summary, name)
    counted: Any = getattr(again, name)
    match name:
        case "totals":
            return _in_order(written) == _in_order(counted)
        case "files":  # the directory may have been moved, all of it
            names = [{key: Path(path).name for key, path in named.items()} for named in (written, counted)]
            return names[0] == names[1] and len({Path(path).parent for path in written.values()}) == 1
        case "rows_per_minute" | "tokens_per_minute":
            return bool(abs(written - counted) <= RATE_STEP + written * 0.001 / max(summary.elapsed_s, 0.001))
        case "requests_per_minute" | "updated_at" | "elapsed_s":
            return written is not None
        case "last_answer_at":
            return written is None or bool(written <= summary.updated_at)
        case _ if name in _NOWHERE_ELSE:
            return True
        case "invocation" | "started_at" | "pid" | "host":
            start = {record[0]: record for record in known.invocations}.get(summary.invocation)
            return start is not None and start[1:4] == (summary.started_at.timestamp(), summary.pid, summary.host)
        case "exit_code":
            # the job decides what counts as failed: any row that is not `ok` may
            return written in ((0, 3) if summary.by_status.keys() - {Status.OK} else (0,))
        case "state" | "limited_by":
            return bool(written == "complete")
        case "reason":
            return written is None
        case _:
            return bool(written == counted)


def _in_order(lines: Iterable[TotalsLine]) -> list[TotalsLine]:
    return sorted(lines, key=lambda line: line.key)
