"""The figures of a bill's line: sums, and what is computed from the sums. PURE.

docs/cost.md has every formula. An unknown figure is None, never 0.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import msgspec

from batchrun.money import PICO
from batchrun.report.cost_lines import known_cost
from batchrun.report.latencies import percentile


class BillLine(msgspec.Struct, frozen=True):
    """Usage and cost of one group. `wasted_usd` is the part of `cost_usd` paid for answers that are not in the output.

    Figures of whole runs are None where groups divide runs: `complete`, `pending`, `possibly_billed`,
    `possibly_billed_usd`, `expected_usd` and the share of the limit. `expected_usd` is what complete runs were
    estimated to cost, `compared_usd` what the same runs cost. `latencies` are buckets; None if rows were not read.
    """

    group: tuple[str, ...]
    runs: int = 0
    complete: int | None = 0
    rows: int = 0
    pending: int | None = 0
    ok: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    completion_tokens: int = 0
    reasoning_tokens: int | None = None
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    wasted_usd: Decimal = Decimal(0)
    possibly_billed: int | None = 0
    possibly_billed_usd: Decimal | None = Decimal(0)
    unpriced: int = 0
    without_usage: int = 0
    reused: int = 0
    saved_usd: Decimal = Decimal(0)
    expected_usd: Decimal | None = None
    compared_usd: Decimal | None = None
    latencies: Mapping[int, int] | None = None
    limit_used_s: float | None = None
    limit_s: float | None = None


def _per(cost_usd: Decimal | None, count: int, times: int = 1) -> Decimal | None:
    return None if cost_usd is None or not count else (cost_usd * times / count).quantize(PICO)


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else round(part / whole, 6)


def _all_cost(line: BillLine) -> Decimal | None:
    """The cost if all of it is known: a cost per row that leaves out a part would be too low."""
    return None if line.unpriced or line.without_usage else line.cost_usd


def _latency(share: float) -> Callable[[BillLine], float | None]:
    def figure(line: BillLine) -> float | None:
        seconds = None if line.latencies is None else percentile(line.latencies, share)
        return None if seconds is None else float(f"{seconds:.3g}")

    return figure


def _off(line: BillLine) -> float | None:
    if not line.expected_usd or line.compared_usd is None:
        return None
    return round(float(line.compared_usd / line.expected_usd - 1), 6)


DERIVED: dict[str, Callable[[BillLine], Decimal | float | None]] = {
    "ok_share": lambda line: _share(line.ok, line.rows),
    "cost_per_1000_rows_usd": lambda line: _per(_all_cost(line), line.rows, 1000),
    "cost_per_ok_usd": lambda line: _per(_all_cost(line), line.ok),
    "cached_share": lambda line: _share(line.cached_tokens, line.prompt_tokens),
    "attempts_per_row": lambda line: _share(line.attempts, line.rows),
    "p50_latency_s": _latency(0.5),
    "p95_latency_s": _latency(0.95),
    "p99_latency_s": _latency(0.99),
    "limit_share": lambda line: _share(line.limit_used_s, line.limit_s),
    "estimate_off": _off,
}
"""Computed from a line's sums, so the total's figures are not means of means."""

_HELD = ("latencies", "limit_used_s", "limit_s")
SUMS = tuple(name for name in BillLine.__struct_fields__[1:] if name not in _HELD)
FIGURES = (*SUMS, *DERIVED)
"""Every column of a bill after its keys, in order."""

Value = int | float | Decimal | None


def figure(line: BillLine, name: str) -> Value:
    """One of `FIGURES`; None if it is unknown."""
    if name in DERIVED:
        return DERIVED[name](line)
    if name == "cost_usd":
        return known_cost(line.cost_usd, line.unpriced + line.without_usage)
    value: Any = getattr(line, name)
    return value  # type: ignore[no-any-return]


def kind(name: str) -> str:
    """The kind of a figure: `usd`, `share`, `seconds`, `ratio` or `count`."""
    if name.endswith("_usd"):
        return "usd"
    if name.endswith("_share") or name == "estimate_off":
        return "share"
    if name.endswith("_latency_s"):
        return "seconds"
    return "ratio" if name == "attempts_per_row" else "count"


def added(one: BillLine, other: BillLine) -> BillLine:
    """The sum of both lines. A figure that only one of them has is taken as it is."""
    names = BillLine.__struct_fields__[1:]
    return BillLine(one.group, *(_sum(getattr(one, name), getattr(other, name)) for name in names))


def _sum(one: Any, other: Any) -> Any:
    if one is None or other is None:
        return other if one is None else one
    if isinstance(one, Mapping):
        return {bucket: one.get(bucket, 0) + other.get(bucket, 0) for bucket in {*one, *other}}
    return one + other
