"""The cost of a run in words, and everything that the amount does not cover. PURE."""

from collections.abc import Iterable, Mapping
from decimal import Decimal

import msgspec

from batchrun.money import PICO
from batchrun.prices import PriceTable
from batchrun.records import PossiblyBilled
from batchrun.report.wording import plural, were
from batchrun.run_summary import Estimate, Summary
from batchrun.store.totals import LOST


def prices_in_words(tables: Mapping[str, PriceTable | None]) -> list[str]:
    """The price of each model."""
    return [f"{model}: no known price" if table is None else table.describe() for model, table in tables.items()]


def known_cost(cost_usd: Decimal, unknown: int) -> Decimal | None:
    """The sum of all known costs; None if no cost is known: an unknown cost is not 0.

    `unknown` counts the attempts whose price or usage is unknown.
    """
    return None if unknown and not cost_usd else cost_usd


def cost_so_far(summary: Summary) -> Decimal | None:
    """The known cost of a run; None if all it may have cost is at an unknown price, answers and doubts alike."""
    return known_cost(summary.cost_usd, summary.unpriced + summary.without_usage + unbounded(summary))


def unbounded(summary: Summary) -> int:
    """Requests that may have been billed, at an unknown price, among those that are listed."""
    return sum(doubt.upper_bound_usd is None for doubt in summary.possibly_billed)


def bound_usd(summary: Summary) -> Decimal | None:
    """The most that requests without a known end can have cost; None if none of them has a known price."""
    return known_cost(summary.possibly_billed_usd, unbounded(summary))


def headline_usd(summary: Summary, form: str = ",.6f") -> str:
    """The cost so far, as every line shows it."""
    return cost_in_words(cost_so_far(summary), summary.possibly_billed_usd, form)


def cost_in_words(cost_usd: Decimal | None, possibly_billed_usd: Decimal, form: str) -> str:
    """A cost, None if unknown. Where only requests without a known end can have cost anything, their bound."""
    if cost_usd is None:
        return "unknown"
    if not cost_usd and possibly_billed_usd:
        return f"at most ${possibly_billed_usd:{form}}"
    return f"${cost_usd:{form}}"


def about_cost(rows: int, mean_cost_usd: Decimal | None) -> str:
    """The expected cost of `rows` rows, to append to a line; empty if no price is known."""
    return "" if mean_cost_usd is None else f", about ${mean_cost_usd * rows:,.4f}"


def cost_lines(summary: Summary) -> list[str]:
    """The cost, then a line for each thing that it does not cover."""
    lines = [headline_usd(summary)]
    if summary.wasted_usd:
        lines.append(f"${summary.wasted_usd:,.6f} of it paid for answers that are not in the output")
    lost = sum(line.attempts for line in summary.totals if line.status == LOST)
    if count := max(summary.possibly_billed_count, lost):
        lines.append(possibly_billed(count, lost, up_to(count, summary.possibly_billed_usd, summary.possibly_billed)))
    if reported := sum((line.reported_cost_usd for line in summary.totals), Decimal(0)):
        lines.append(f"the server itself reports ${reported:,.6f}")
    if summary.unpriced:
        tiers = f" (none for the service tier {', '.join(summary.unpriced_tiers)})" if summary.unpriced_tiers else ""
        used = f" (none for {', '.join(summary.unpriced_usage)})" if summary.unpriced_usage else ""
        lines.append(f"no known price for {plural(summary.unpriced, 'attempt')}{tiers}{used}: not included in any sum")
    if summary.without_usage:
        lines.append(f"{plural(summary.without_usage, 'answer')} came without usage: not included in any sum")
    return lines


def possibly_billed(count: int, lost: int, bound: str) -> str:
    """How many requests were sent without a known end, `lost` of them because a process died. `up_to` makes `bound`."""
    if lost >= count:
        return f"{plural(count, 'request')} {were(count)} in flight when a process died; {bound}"
    some = f", {lost:,} of them because a process died" if lost else ""
    return f"{plural(count, 'request')} {were(count)} sent without a known end{some}; {bound}"


def up_to(count: int, usd: Decimal, doubts: Iterable[PossiblyBilled]) -> str:
    """The most that these requests may have cost; without a known price it has no bound."""
    they = "it" if count == 1 else "they"
    bounds = [doubt.upper_bound_usd for doubt in doubts]  # empty where only a result's footer is left of a run
    if None not in bounds and (bounds or usd):
        return f"{they} may have cost up to ${usd:,.6f} more"
    if not usd:
        return f"{they} may have been billed, at an unknown price"
    return f"those with a known price may have cost up to ${usd:,.6f} more"


def estimate_in_words(summary: Summary) -> str | None:
    """The estimated cost of the run before its first request, compared with the real cost of the same rows."""
    if (estimate := summary.estimate) is None:
        return None
    done, rows = summary.done, plural(estimate.rows, "row")
    if estimate.expected_usd is None:
        return f"{estimate.prompt_tokens:,} tokens in and {estimate.completion_tokens:,} out for {rows}"
    whole = f"${estimate.expected_usd:,.6f} for {rows}"
    expected_usd = scaled(estimate, done).expected_usd or Decimal(0)
    if not done or not expected_usd or not summary.cost_usd or summary.unpriced or summary.without_usage:
        return whole  # rows that all failed say nothing about a price, and a cost known in part can't be compared
    so_far = f", ${expected_usd:,.6f} for the {done:,} done" if summary.pending else ""
    off = (summary.cost_usd / expected_usd - 1) * 100
    far_off = f"{abs(off):.0f} % {'above' if off > 0 else 'below'} that"
    return f"{whole}{so_far}; the cost is {far_off if round(off) else 'as estimated'}"


def scaled(estimate: Estimate, rows: int) -> Estimate:
    """The estimate for that many of its rows."""
    if rows == estimate.rows or not estimate.rows:
        return estimate
    share = Decimal(rows) / estimate.rows
    usd = {name: getattr(estimate, name) for name in ("low_usd", "expected_usd", "high_usd")}
    return msgspec.structs.replace(
        estimate,
        rows=rows,
        prompt_tokens=round(estimate.prompt_tokens * share),
        completion_tokens=round(estimate.completion_tokens * share),
        minutes=None if estimate.minutes is None else estimate.minutes * float(share),
        **{name: None if known is None else (known * share).quantize(PICO) for name, known in usd.items()},
    )
