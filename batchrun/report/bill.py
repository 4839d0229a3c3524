"""The bill over runs: the lines of their totals, added up by group. PURE, but for reading them."""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from batchrun.checkpoint.spent import DISCARDED, LOST
from batchrun.errors import JobError
from batchrun.records import TotalsLine
from batchrun.report import runs
from batchrun.report.runs import Account, LeftOut

KEYS = ("day", "job", "model", "status", "run")


class BillLine(msgspec.Struct, frozen=True):
    """What one group used and cost. `wasted_usd` is the part of `cost_usd` that was paid for answers that are not in
    the output, however they came to be replaced.
    """

    group: tuple[str, ...]
    rows: int = 0
    attempts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    wasted_usd: Decimal = Decimal(0)
    unpriced: int = 0
    without_usage: int = 0


FIGURES = BillLine.__struct_fields__[1:]


class WithoutUsage(msgspec.Struct, frozen=True):
    """A job's answers that came without usage, and about how many tokens they had by an offline count."""

    job: str
    answers: int
    offline_prompt_tokens: int
    offline_completion_tokens: int


class Expected(msgspec.Struct, frozen=True):
    """What complete runs were estimated to cost before their first request, and what they cost."""

    runs: int
    expected_usd: Decimal
    cost_usd: Decimal


class Bill(msgspec.Struct, frozen=True):
    """The lines in the order of their groups, their sum, and what is beyond it: the upper bound of what may have been
    billed, the answers without usage, attempts without a known price by model, and what was found and not counted.
    The sum's attempts include the `lost` ones, sent before the process died or was stopped at once.
    """

    by: tuple[str, ...]
    lines: tuple[BillLine, ...]
    total: BillLine
    runs: int
    possibly_billed: int
    possibly_billed_usd: Decimal
    lost: int
    without_usage: tuple[WithoutUsage, ...]
    unpriced: dict[str, int]
    estimated: Expected | None
    left_out: tuple[LeftOut, ...]


def keys(by: str) -> tuple[str, ...]:
    """What to group by, of a text such as `job,model`.

    Raises:
        JobError: an unknown key, or one twice.
    """
    named = tuple(by.split(","))
    if unknown := [key for key in named if key not in KEYS]:
        raise JobError(f"--by {unknown[0]}: expected some of {', '.join(KEYS)}")
    if twice := [key for key in KEYS if named.count(key) > 1]:
        raise JobError(f"--by {by}: names {twice[0]} twice")
    return named


def collect(paths: Sequence[Path], by: tuple[str, ...]) -> Bill:
    """The bill over every run that the paths name or hold, each run counted once, whatever their order.

    Raises:
        InputError: a path holds no run, or one that can't be read.
    """
    found = runs.find(paths)
    booked = [(account, line) for account in found.accounts for line in account.totals]
    lines: dict[tuple[str, ...], BillLine] = {}
    for account, line in booked:
        group = tuple(_key(key, account, line) for key in by)
        lines[group] = _add(lines.get(group) or BillLine(group), line)
    total = BillLine(("total",))
    for _, line in booked:
        total = _add(total, line)
    return Bill(
        by=by,
        lines=tuple(lines[group] for group in sorted(lines)),
        total=total,
        runs=len(found.accounts),
        possibly_billed=sum(account.possibly_billed_count for account in found.accounts),
        possibly_billed_usd=sum((account.possibly_billed_usd for account in found.accounts), Decimal(0)),
        lost=sum(line.attempts for _, line in booked if line.status == LOST),
        without_usage=tuple(_without_usage(found.accounts)),
        unpriced=_unpriced(line for _, line in booked),
        estimated=_expected(found.accounts),
        left_out=found.left_out,
    )


def _unpriced(lines: Iterable[TotalsLine]) -> dict[str, int]:
    """Attempts without a known price, by model."""
    attempts: dict[str, int] = {}
    for line in lines:
        if line.unpriced:
            attempts[line.model] = attempts.get(line.model, 0) + line.unpriced
    return dict(sorted(attempts.items()))


def _expected(accounts: Sequence[Account]) -> Expected | None:
    """None where no complete run has both an estimate and a cost."""
    known = [
        (account.estimate.expected_usd, sum((line.cost_usd for line in account.totals), Decimal(0)))
        for account in accounts
        if account.complete and account.estimate is not None and account.estimate.expected_usd is not None
        if not any(line.unpriced or line.without_usage for line in account.totals)
    ]
    if not known:
        return None
    return Expected(len(known), sum((e for e, _ in known), Decimal(0)), sum((c for _, c in known), Decimal(0)))


def _without_usage(accounts: Sequence[Account]) -> Iterator[WithoutUsage]:
    for job in sorted({account.job for account in accounts}):
        lines = [line for account in accounts if account.job == job for line in account.totals]
        if answers := sum(line.without_usage for line in lines):
            prompt_tokens = sum(line.offline_prompt_tokens for line in lines)
            yield WithoutUsage(job, answers, prompt_tokens, sum(line.offline_completion_tokens for line in lines))


def _key(key: str, account: Account, line: TotalsLine) -> str:
    match key:
        case "day":
            return line.day or "unknown"
        case "job":
            return account.job
        case "run":
            return account.run_id
        case "model":
            return line.model
        case _:
            return line.status


def _add(sum_: BillLine, line: TotalsLine) -> BillLine:
    changes: dict[str, Any] = {
        name: getattr(sum_, name) + getattr(line, name) for name in FIGURES if name != "wasted_usd"
    }
    wasted = line.cost_usd if line.status == DISCARDED else 0
    return BillLine(sum_.group, **changes, wasted_usd=sum_.wasted_usd + wasted)
