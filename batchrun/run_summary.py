"""The figures of a run: `Summary`, which summary.json holds, and the frozen values in it."""

from collections.abc import Collection, Iterable
from datetime import datetime
from decimal import Decimal

import msgspec

from batchrun.records import PossiblyBilled


class TotalsLine(msgspec.Struct, frozen=True):
    """Spending of one invocation on one model and outcome on one UTC day (`2026-11-28`; "": unknown). `status` is a
    row status, `discarded`: attempts whose answers are not in the output, or `lost`. `service_tier` is the one that the
    answers name; "": none.

    `unpriced` counts attempts whose price is unknown, `without_usage` answers that brought no usage;
    neither adds to `cost_usd`. `offline_*` are about the tokens of the latter, by a count of our own: no other figure
    holds them. Cached, written and reasoning tokens are None where no answer stated them, which is not 0.

    `reused` of the `rows` took an answer without a request, `duplicates` of those that of an equal row of this run;
    `saved_usd` is what these answers cost when they were paid for.
    """

    invocation: int
    model: str
    status: str
    day: str = ""
    service_tier: str = ""
    rows: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    unpriced: int = 0
    without_usage: int = 0
    offline_prompt_tokens: int = 0
    offline_completion_tokens: int = 0
    cache_write_tokens: int | None = None
    reported_cost_usd: Decimal = Decimal(0)
    reused: int = 0
    duplicates: int = 0
    saved_usd: Decimal = Decimal(0)

    @property
    def key(self) -> "LineKey":
        """The key that distinguishes the line from the run's other lines."""
        return self.invocation, self.model, self.status, self.day, self.service_tier


def stated(lines: Iterable[TotalsLine], name: str) -> int | None:
    """The sum of a count over the lines that have it; None where no answer stated it."""
    counts = [count for line in lines if (count := getattr(line, name)) is not None]
    return sum(counts) if counts else None


def cached_share(lines: Collection[TotalsLine]) -> float | None:
    """The share of all prompt tokens that came from a cache; None where no answer stated it, or there was no prompt."""
    prompt, cached = sum(line.prompt_tokens for line in lines), stated(lines, "cached_tokens")
    return cached / prompt if cached is not None and prompt else None


LineKey = tuple[int, str, str, str, str]
"""Invocation, model, status, day, service tier."""


class Estimate(msgspec.Struct, frozen=True):
    """The estimate for `rows` rows; USD are None where a price is unknown. `basis`: what `expected` rests on; `short`:
    the caps of the budget that are less than that, in words.
    """

    rows: int
    prompt_tokens: int
    completion_tokens: int
    low_usd: Decimal | None
    expected_usd: Decimal | None
    high_usd: Decimal | None
    minutes: float | None
    limited_by: str
    basis: str
    short: tuple[str, ...] = ()


class InForce(msgspec.Struct, frozen=True):
    """The limits that hold now, by the job, by `batchrun tune`, or learned; None: no such limit."""

    requests_per_minute: float | None
    tokens_per_minute: float | None
    max_in_flight: int
    max_cost_usd: Decimal | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    requests_per_second: float | None = None
    requests_per_day: int | None = None
    input_tokens_per_minute: float | None = None
    output_tokens_per_minute: float | None = None


class EndpointTotals(msgspec.Struct, frozen=True):
    """The figures of one of several endpoints in this process; `set_aside` is why it gets no more requests."""

    label: str
    requests: int
    answered: int
    set_aside: str | None = None


class BudgetUse(msgspec.Struct, frozen=True):
    """The use of a cap over time: `spent_usd`, and `in_doubt_usd` that may have been billed.

    `setting` is the cap's name in `[budget]`; `period` is the day, the month, or `start`; `opens_at` is when it
    opens again, None: with the next start.
    """

    budget: str
    setting: str
    period: str
    cap_usd: Decimal
    spent_usd: Decimal
    in_doubt_usd: Decimal
    opens_at: datetime | None

    @property
    def key(self) -> tuple[str, str]:
        """The key that distinguishes it from the run's other caps and periods."""
        return self.setting, self.period

    @property
    def is_nearly_used(self) -> bool:
        """True from 80 % on."""
        return self.spent_usd + self.in_doubt_usd >= NEARLY * self.cap_usd


NEARLY = Decimal("0.8")


class Tuned(msgspec.Struct, frozen=True):
    """The result of the last control.json, by its id; `refused` says why it was ignored, None: it was applied."""

    id: str
    refused: str | None


class Retrying(msgspec.Struct, frozen=True):
    """Rows that failed and will be sent again. `first` are the lowest of them, `attempts` the most that one has had,
    `reasons` the commonest failures, each with its rows; `next_at`: when the next one is sent, None: at once.
    """

    rows: int
    first: list[int]
    attempts: int
    reasons: dict[str, int]
    next_at: datetime | None


class Shard(msgspec.Struct, frozen=True):
    """One of `count` runs that share an input; `number` counts from 0, as array jobs do."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def suffix(self) -> str:
        """The end of its run directory's name: names sort in the order of shards."""
        return f".shard-{self.number:0{len(str(self.count - 1))}d}-of-{self.count}"


class MergedShard(msgspec.Struct, frozen=True):
    """A shard as it was when it was merged into a run."""

    run_id: str
    shard: str
    rows: int
    attempts: int
    cost_usd: Decimal


class Live(msgspec.Struct, frozen=True):
    """How the run sends now. Rates and `refused_share` (None: nothing was sent) are of the last half minute, `refused`
    counts this start's. `circuit` is `open`, `cooling`, `probing` or `stopped`; open: requests are sent.
    """

    in_flight: int
    allowed_in_flight: int
    requests_per_second: float
    refused: int
    refused_share: float | None
    circuit: str


class Summary(msgspec.Struct, frozen=True):
    """`summary.json`: state and figures of a run, from its first second on. Its schema is in docs/output.md."""

    version: int
    job: str
    run_id: str
    state: str
    exit_code: int | None
    reason: str | None
    complete: bool
    rows: int
    rows_in_output: int
    rejected: int
    by_status: dict[str, int]
    pending: int
    totals: list[TotalsLine]
    cost_usd: Decimal
    wasted_usd: Decimal
    unpriced: int
    without_usage: int
    possibly_billed: list[PossiblyBilled]
    possibly_billed_count: int
    possibly_billed_usd: Decimal
    models: dict[str, int]
    unknown_finish_reasons: list[str]
    unpriced_tiers: list[str]
    unpriced_usage: list[str]
    example_error: str | None
    price: str | None
    estimate: Estimate | None
    invocation: int
    created_at: datetime
    started_at: datetime
    updated_at: datetime
    elapsed_s: float
    rows_per_minute: float
    requests_per_minute: float
    tokens_per_minute: float
    tokens_per_second: float
    limited_by: str
    limits: InForce | None
    tuned: Tuned | None
    eta: datetime | None
    deadline: datetime | None
    by_deadline: float | None
    pid: int
    host: str
    command: str | None
    files: dict[str, str]
    export: str | None = None
    retrying: Retrying | None = None
    tags: dict[str, str] = {}
    endpoints: list[EndpointTotals] = []
    budgets: list[BudgetUse] = []
    reused: int = 0
    duplicates: int = 0
    saved_usd: Decimal = Decimal(0)
    shard: str | None = None
    merged: list[MergedShard] = []
    live: Live | None = None
    last_answer_at: datetime | None = None

    @property
    def done(self) -> int:
        """Rows with a completion."""
        return self.rows - self.pending

    def to_json(self) -> bytes:
        """The content of summary.json."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)
