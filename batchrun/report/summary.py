"""`summary.json`: what a run writes about itself, from its first second to its last, and how it is read. PURE."""

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from batchrun.errors import CheckpointError, InputError, quoted, writable
from batchrun.limits.deadline import Deadline
from batchrun.limits.forecast import Forecast
from batchrun.prices import PriceTable
from batchrun.records import FAILURES, Status
from batchrun.report.cost_lines import prices_in_words, scaled
from batchrun.run_summary import BudgetUse, EndpointTotals, InForce, Live, Retrying, Summary, Tuned
from batchrun.store import result_files
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import Totals

VERSION = 3
"""The schema of summary.json (docs/output.md). Increase it when a field is removed or changes its meaning."""

FIRST_S = 5.0
"""A younger start has no ETA: few requests are in flight yet, and the first answers arrive all at once."""

RATE_S = 60.0
"""A shorter start has no rate per minute: the burst that a limit allows would read as a broken limit. 348 requests in
10 s are 2,087 a minute, and within 1,500 a minute if the first of them went out at once."""


class Moment(msgspec.Struct, frozen=True):
    """Everything in a summary that the totals do not give. Times are wall time, except `now_s`, which is `now` on the
    monotonic clock. `elapsed_s` and `sent` belong to this invocation.
    """

    state: str
    invocation: int
    started_at: datetime
    now: datetime
    elapsed_s: float
    sent: int
    limited_by: str
    pid: int
    host: str
    exit_code: int | None = None
    reason: str | None = None
    complete: bool = False
    forecast: Forecast | None = None
    deadline: Deadline | None = None
    now_s: float = 0.0
    limits: InForce | None = None
    tuned: Tuned | None = None
    unknown_finish_reasons: list[str] = []
    unpriced_tiers: list[str] = []
    unpriced_usage: list[str] = []
    example_error: str | None = None
    command: str | None = None
    retrying: Retrying | None = None
    tags: dict[str, str] = {}
    endpoints: list[EndpointTotals] = []
    budgets: list[BudgetUse] = []
    live: Live | None = None
    last_answer_at: datetime | None = None

    @property
    def eta(self) -> datetime | None:
        """When every row will be settled; None if that can't be estimated yet."""
        if self.forecast is None or self.forecast.done_in_s is None or self.forecast.seen_s < FIRST_S:
            return None
        return self.now + timedelta(seconds=round(self.forecast.done_in_s))

    def by_deadline(self, settled: int, rows: int) -> float | None:
        """The share of the rows that will be settled by the deadline."""
        if self.forecast is None or self.deadline is None:
            return None
        return round(self.forecast.share_by(self.deadline.at_s - self.now_s, settled, rows), 4)


def read(directory: RunDirectory) -> Summary:
    """The summary of the run in the directory.

    Raises:
        InputError: there is no run.
        CheckpointError: damaged, or of another version.
    """
    try:
        summary = msgspec.json.decode(directory.summary.read_bytes(), type=Summary)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{directory.path}: no run here (no summary.json)") from error
    except OSError as error:
        raise InputError(f"{directory.summary}: can't be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{directory.summary}: damaged, or of another version of batchrun ({error}); run the same command again to "
            "rewrite it, or run batchrun verify to check the rest"
        ) from error
    if summary.version != VERSION:
        raise CheckpointError(f"{directory.summary}: written by another version of batchrun (schema {summary.version})")
    return summary


def read_or_none(directory: RunDirectory) -> Summary | None:
    """The summary of the run in the directory; None if it is missing or can't be read."""
    try:
        return read(directory)
    except (InputError, CheckpointError):
        return None


_OF_THE_RUN = (
    *("job", "run_id", "created_at", "rows", "rejected", "by_status", "pending", "totals", "cost_usd", "wasted_usd"),
    *("unpriced", "without_usage", "possibly_billed", "possibly_billed_count", "possibly_billed_usd", "models"),
    *("unknown_finish_reasons", "unpriced_tiers", "unpriced_usage", "example_error", "price", "estimate"),
    "invocation",
    *("reused", "duplicates", "saved_usd", "shard", "merged", "command"),
)
"""The fields that describe the whole run, not one start of it."""

_NOT_IN_CHECKPOINT = (
    *("unknown_finish_reasons", "unpriced_tiers", "unpriced_usage", "example_error", "price", "estimate"),
    *("shard", "merged", "command"),
)
"""Fields of the run that the checkpoint does not hold."""


def starting(
    job: str, moment: Moment, directory: RunDirectory, earlier: Summary | None, spent: Totals | None
) -> Summary:
    """The summary of a start that has not read its input yet and may still be refused: the run's figures stay, and the
    command that resumes it.

    `earlier` is the summary of the start before; `spent` are the totals, once the checkpoint is open.
    """
    if earlier is None:
        run: dict[str, Any] = {"job": job, "run_id": "", "created_at": moment.started_at, "rejected": 0}
        return _summary(moment, Totals(), directory, 0, run | {"price": None, "estimate": None})
    run = {name: getattr(earlier, name) for name in ("job", "run_id", "created_at", "rejected", "price", "estimate")}
    now = _summary(moment, spent or Totals(), directory, earlier.rows, run)
    kept = _OF_THE_RUN if spent is None else _NOT_IN_CHECKPOINT
    return msgspec.structs.replace(now, **{name: getattr(earlier, name) for name in kept})


def summarise(
    manifest: Manifest,
    rows: int,
    tables: dict[str, PriceTable | None],
    spent: Totals,
    moment: Moment,
    directory: RunDirectory,
) -> Summary:
    """The summary of the run now. Everything in it is durable."""
    run = {
        "job": manifest.job,
        "run_id": manifest.run_id,
        "created_at": manifest.created_at,
        "rejected": len(manifest.rejected),
        "price": "; ".join(prices_in_words(tables)) or None,
        "estimate": None if manifest.estimate is None else scaled(manifest.estimate, rows),
        "shard": None if manifest.share is None else str(manifest.share.shard),
        "merged": list(manifest.merged),
    }
    return _summary(moment, spent, directory, rows, run)


_OF_THE_MOMENT = tuple(name for name in Moment.__struct_fields__ if name in Summary.__struct_fields__)
"""The fields that the summary has as the moment has them, except `elapsed_s` and `deadline`."""


def _summary(moment: Moment, spent: Totals, directory: RunDirectory, rows: int, run: dict[str, Any]) -> Summary:
    """`run` are the fields that neither the moment nor the totals have."""
    settled, lines = spent.settled(), spent.lines()
    mine = [line for line in spent.booked.values() if line.invocation == moment.invocation]
    minutes = max(moment.elapsed_s, 1e-9) / 60
    of_the_moment: dict[str, Any] = {name: getattr(moment, name) for name in _OF_THE_MOMENT}
    of_the_moment["elapsed_s"] = round(moment.elapsed_s, 3)
    of_the_moment["deadline"] = None if moment.deadline is None else moment.deadline.at.astimezone(UTC)
    found = files(directory) if moment.complete else files_so_far(directory, moment.started_at)
    has_unwritten = spent.standing and "usage" in found and not found.keys() & {"completions", "partial"}
    return Summary(
        version=VERSION,
        rows=rows,
        rows_in_output=settled if moment.complete else 0,
        by_status={str(status): n for status in Status if (n := spent.standing.get(status, 0))},
        pending=rows - settled,
        totals=lines,
        cost_usd=spent.cost_usd(),
        wasted_usd=spent.wasted_usd(),
        unpriced=sum(line.unpriced for line in lines),
        without_usage=sum(line.without_usage for line in lines),
        possibly_billed=list(spent.possibly_billed),
        possibly_billed_count=spent.possibly_billed_count,
        possibly_billed_usd=spent.possibly_billed_usd,
        models=spent.answered_as,
        updated_at=moment.now,
        rows_per_minute=round(sum(line.rows for line in mine) / minutes, 1),
        requests_per_minute=round(moment.sent / minutes, 1),
        tokens_per_minute=round(sum(line.total_tokens for line in mine) / minutes, 1),
        tokens_per_second=0.0 if moment.forecast is None else round(moment.forecast.tokens_per_s, 1),
        eta=moment.eta,
        by_deadline=moment.by_deadline(settled, rows),
        files=found,
        export=f"batchrun export {quoted(directory.path)}" if has_unwritten else None,
        reused=sum(line.reused for line in lines),
        duplicates=sum(line.duplicates for line in lines),
        saved_usd=sum((line.saved_usd for line in lines), Decimal(0)),
        **of_the_moment,
        **run,
    )


def files(directory: RunDirectory) -> dict[str, str]:
    """The files of a complete run."""
    return {"completions": writable(str(result_files.shown(directory))), "usage": writable(str(directory.usage))}


def files_so_far(directory: RunDirectory, since: datetime) -> dict[str, str]:
    """The files of a run that is not complete, as far as the start at `since` wrote them."""
    return {
        name: writable(str(path))
        for name, path in (("partial", directory.partial), ("usage", directory.usage))
        if path.exists() and path.stat().st_mtime >= since.timestamp()
    }


def failures(summary: Summary, failing: Collection[Status] = FAILURES) -> int:
    """Rows that count against `max_failures`."""
    return sum(summary.by_status.get(str(status), 0) for status in failing)
