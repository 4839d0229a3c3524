"""Computes the samples of metrics from a run's summary. PURE.

A function that returns a function makes what `Metric.samples` calls with each snapshot.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from decimal import Decimal

import msgspec

from batchrun import __version__
from batchrun.records import Status
from batchrun.report.cost_lines import known_cost
from batchrun.run_summary import BudgetUse, Summary, TotalsLine
from batchrun.store.totals import LOST, SEVERAL

MOST_MODELS = 20
"""Models that have a label value of their own, the first that were used; a column of models must not flood a server."""

OTHER = "(other)"

Value = int | float | Decimal
Labels = dict[str, str]


class Snapshot(msgspec.Struct, frozen=True):
    """A run at one moment. `last_success_at`: when a run of the job last ended with exit code 0.

    `shard` is such as `3/16`; None: the run has the whole input.
    """

    summary: Summary
    directory: str
    last_success_at: datetime | None = None
    shard: str | None = None

    def labels(self, prefix: str = "") -> Labels:
        """What every sample has."""
        job = {f"{prefix}job": self.summary.job}
        return job if self.shard is None else {**job, f"{prefix}shard": self.shard}


Samples = Iterable[tuple[Labels, Value | None]]


def of_summary(value: Callable[[Summary], Value | None]) -> Callable[[Snapshot], Samples]:
    """One sample without labels."""
    return lambda snapshot: [({}, value(snapshot.summary))]


def moment_of(moment: Callable[[Summary], datetime | None]) -> Callable[[Snapshot], Samples]:
    """One sample without labels: a moment in seconds of Unix time."""
    return of_summary(lambda summary: _seconds(moment(summary)))


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def one_of(label: str, values: Iterable[str], now: Callable[[Summary], str | None]) -> Callable[[Snapshot], Samples]:
    """1 for the value that holds now and 0 for the others; nothing where none does."""

    def samples(snapshot: Snapshot) -> Samples:
        held = now(snapshot.summary)
        return [] if held is None else [({label: value}, int(value == held)) for value in values]

    return samples


def _by_model(summary: Summary) -> dict[str, list[TotalsLine]]:
    """The lines of each model; those of all models beyond the first are one."""
    lines: dict[str, list[TotalsLine]] = {}
    for line in summary.totals:
        if line.status == LOST and line.model == SEVERAL:
            continue
        name = line.model if line.model in lines or len(lines) < MOST_MODELS else OTHER
        lines.setdefault(name, []).append(line)
    return lines


def per_model(value: Callable[[list[TotalsLine]], Value | None]) -> Callable[[Snapshot], Samples]:
    """A sample for each model, of its lines."""
    return lambda snapshot: [({"model": model}, value(lines)) for model, lines in _by_model(snapshot.summary).items()]


def requests(lines: list[TotalsLine]) -> int:
    """Requests of one model that ended."""
    # a lost attempt's model is a guess that may change, and a counter must not fall
    return added_up((line for line in lines if line.status != LOST), "attempts")


def sum_per_model(field: str) -> Callable[[Snapshot], Samples]:
    """A sample for each model: the sum of a field of its lines."""
    return per_model(lambda lines: added_up(lines, field))


def added_up(lines: Iterable[TotalsLine], field: str) -> int:
    """The sum of a field over the lines."""
    return sum(int(getattr(line, field)) for line in lines)


def rows(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    """A sample for each model and status."""
    for model, lines in _by_model(snapshot.summary).items():
        for status in Status:
            yield {"model": model, "status": str(status)}, added_up((x for x in lines if x.status == status), "rows")


def tokens(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    """A sample for each model and kind of token."""
    for model, lines in _by_model(snapshot.summary).items():
        for kind in ("prompt", "completion"):
            yield {"model": model, "kind": kind}, added_up(lines, f"{kind}_tokens")


def cost(lines: list[TotalsLine]) -> Decimal | None:
    """The certain cost of one model; None where no price is known."""
    cost_usd = sum((line.cost_usd for line in lines), Decimal(0))
    return known_cost(cost_usd, added_up(lines, "unpriced") + added_up(lines, "without_usage"))


def run_info(snapshot: Snapshot) -> Samples:
    """One sample whose labels name the run."""
    return [({"run_id": snapshot.summary.run_id, "directory": snapshot.directory, "version": __version__}, 1)]


def last_success(snapshot: Snapshot) -> Samples:
    """One sample: when a run of the job last succeeded."""
    return [({}, _seconds(snapshot.last_success_at))]


def request_limit(summary: Summary) -> float | None:
    """The lower of the limits on requests, a second."""
    limits = summary.limits
    if limits is None:
        return None
    per_minute = limits.requests_per_minute
    known = (limits.requests_per_second, None if per_minute is None else per_minute / 60)
    return min((limit for limit in known if limit is not None), default=None)


def token_limit(summary: Summary) -> float | None:
    """The limit on tokens, a second."""
    limits = summary.limits
    return None if limits is None or limits.tokens_per_minute is None else limits.tokens_per_minute / 60


def budget_caps(value: Callable[[BudgetUse], Decimal]) -> Callable[[Snapshot], Samples]:
    """A value of each cap on money. The whole run's cap is not in `Summary.budgets`."""

    def samples(snapshot: Snapshot) -> Samples:
        summary = snapshot.summary
        caps = list(summary.budgets)
        if summary.limits is not None and (cap := summary.limits.max_cost_usd) is not None:
            used = summary.cost_usd, summary.possibly_billed_usd
            caps.append(BudgetUse(summary.job, "max_cost_usd", "run", cap, *used, None))
        return [({"budget": use.setting}, value(use)) for use in caps]

    return samples


def live(field: str) -> Callable[[Snapshot], Samples]:
    """One sample: a field of `Summary.live`; none between two starts."""
    return of_summary(lambda summary: None if summary.live is None else getattr(summary.live, field))
