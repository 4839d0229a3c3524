"""The progress of a run in one line: a bar that fits the terminal, or a line for a log. PURE."""

from collections.abc import Callable, Iterator

from batchrun.limits.deadline import in_words
from batchrun.report.cost_lines import headline_usd
from batchrun.report.summary import failures
from batchrun.run_summary import Summary, cached_share

LEAST_BAR = 8
"""Columns below which a bar shows nothing."""

FRAME = 3
"""Columns of the bar's two ends and the space after it."""

MOST_NAME = 16  # columns of the job's name beside a bar, of 80
MOST_ETA = len("ETA Thu 06:00")


def line(summary: Summary) -> str:
    """One line for a log, in full words."""
    done = summary.done
    share = f" ({done / summary.rows:.0%})" if summary.rows else ""
    retried = ""
    if summary.retrying is not None:
        retried = f"{summary.retrying.rows:,} retried ({', '.join(summary.retrying.reasons)})"
    parts = [
        f"{done:,}/{summary.rows:,} rows{share}",
        f"{failures(summary):,} failed",
        *([retried] if retried else []),
        f"{summary.tokens_per_second:,.0f} tokens/s",
        *_cached(summary),
        headline_usd(summary, ",.4f").replace("unknown", "cost unknown"),
    ]
    if summary.limited_by == summary.state:  # no rows are sent
        return ", ".join([*parts, summary.state])
    parts.append(_eta(summary))
    if summary.by_deadline is not None and summary.by_deadline < 1:
        parts.append(f"{int(summary.by_deadline * 100)} % by the deadline")
    return ", ".join([*parts, f"limited by {summary.limited_by}"])


def around_bar(summary: Summary, columns: int) -> tuple[str, str, bool]:
    """The text before the bar and after it, and whether there is room for a bar between them.

    The first of these that fits: all; short numbers; no name; no bar; figures only, without tokens. `columns` is the
    width of the terminal; the last column stays free.
    """
    name = summary.job if len(summary.job) <= MOST_NAME else summary.job[: MOST_NAME - 1] + "…"
    share = f"{summary.done / summary.rows if summary.rows else 1:.0%}"
    full, short = " ".join(_figures(summary, "{:,.0f}".format)), " ".join(_figures(summary, short_number))
    for left, right, bar in (
        (f"{name} {share:>4}", full, 2 * LEAST_BAR),
        (f"{name} {share:>4}", short, LEAST_BAR),
        (share, short, LEAST_BAR),
        (share, short, 0),
    ):
        if len(left) + (bar + FRAME if bar else 1) + len(right) < columns:
            return left, right, bar > 0
    return "", " ".join(_figures(summary, short_number, tight=True)), False


def _figures(summary: Summary, number: Callable[[float], str], *, tight: bool = False) -> Iterator[str]:
    yield f"{number(summary.done)}/{number(summary.rows)}"
    yield f"{number(failures(summary))} failed"
    if summary.retrying is not None:
        yield f"{number(summary.retrying.rows)} retried"
    if not tight:
        yield f"{number(summary.tokens_per_second)} tok/s"
        yield from _cached(summary)
    usd = headline_usd(summary, ".2f").replace("unknown", "$?")
    yield f"${number(float(summary.cost_usd))}" if summary.cost_usd >= 1000 else usd
    eta = _eta(summary)
    yield eta.rpartition(" ")[0] if tight and len(eta) > MOST_ETA else eta
    yield summary.limited_by


def _cached(summary: Summary) -> Iterator[str]:
    """The share of all prompt tokens that came from a cache."""
    if (share := cached_share(summary.totals)) is not None:
        yield f"{share:.0%} cached"


def _eta(summary: Summary) -> str:
    if summary.eta is None:
        return "ETA ?"
    eta = summary.eta.astimezone().replace(second=0, microsecond=0)
    return f"ETA {in_words(eta, summary.updated_at)}"


def short_number(number: float) -> str:
    """Three digits and a unit: 999, 1.23k, 45.6M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}T"
