"""The bill over runs: folds of summaries into tables, and tables into text. PURE, but for reading the summaries.

A run directory tells by its summary.json; a completions file that was moved elsewhere by its footer.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec

from batchrun.checkpoint.spent import DISCARDED, LOST
from batchrun.errors import InputError, JobError
from batchrun.output.files import read_footer
from batchrun.records import TotalsLine
from batchrun.report.summary import known_cost, lost_in_words, plural
from batchrun.rundir import RunDirectory

KEYS = ("day", "job", "model", "status", "run")


class BillLine(msgspec.Struct, frozen=True):
    """What one group of runs used and cost. `wasted_usd` is the part of `cost_usd` that discarded attempts took."""

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


class Bill(msgspec.Struct, frozen=True):
    """The lines in the order of their groups, their sum, and what is beyond it: the upper bound of what may have been
    billed, and the answers that nobody can price. The sum's attempts include the `lost` ones, sent before the process
    died or was stopped at once.
    """

    by: tuple[str, ...]
    lines: tuple[BillLine, ...]
    total: BillLine
    runs: int
    possibly_billed: int
    possibly_billed_usd: Decimal
    lost: int
    without_usage: tuple[WithoutUsage, ...]


class _Account(msgspec.Struct):
    """The part of a summary, or of a footer, that a bill needs."""

    job: str
    run_id: str
    totals: list[TotalsLine]
    possibly_billed_count: int
    possibly_billed_usd: Decimal
    begun_at: str = ""
    by_status: dict[str, int] | None = None


def collect(paths: Sequence[Path], by: tuple[str, ...]) -> Bill:
    """The bill over every run that the paths name or hold, each run counted once.

    Raises:
        JobError: an unknown key to group by.
        InputError: a path holds no run.
    """
    if unknown := [key for key in by if key not in KEYS]:
        raise JobError(f"--by {unknown[0]}: expected some of {', '.join(KEYS)}")
    accounts: dict[str, _Account] = {}
    for path in paths:
        for place in _places(path):
            account = _read(place)
            account.totals = _as_they_stand(account)
            accounts[account.run_id or str(place)] = account
    lines: dict[tuple[str, ...], BillLine] = {}
    for account in accounts.values():
        for line in account.totals:
            group = tuple(_key(key, account, line) for key in by)
            lines[group] = _add(lines.get(group) or BillLine(group), line)
    total = BillLine(("total",))
    for account in accounts.values():
        for line in account.totals:
            total = _add(total, line)
    return Bill(
        by=by,
        lines=tuple(lines[group] for group in sorted(lines)),
        total=total,
        runs=len(accounts),
        possibly_billed=sum(account.possibly_billed_count for account in accounts.values()),
        possibly_billed_usd=sum((account.possibly_billed_usd for account in accounts.values()), Decimal(0)),
        lost=sum(line.attempts for account in accounts.values() for line in account.totals if line.status == LOST),
        without_usage=tuple(_without_usage(list(accounts.values()))),
    )


def _without_usage(accounts: Sequence[_Account]) -> Iterator[WithoutUsage]:
    for job in sorted({account.job for account in accounts}):
        lines = [line for account in accounts if account.job == job for line in account.totals]
        if answers := sum(line.without_usage for line in lines):
            prompt_tokens = sum(line.offline_prompt_tokens for line in lines)
            yield WithoutUsage(job, answers, prompt_tokens, sum(line.offline_completion_tokens for line in lines))


def render(bill: Bill, form: str) -> str:
    """The bill as `table`, `csv` or `json` text, ending in a newline."""
    match form:
        case "csv":
            return _csv(bill)
        case "json":
            return msgspec.json.format(msgspec.json.encode(_tree(bill)), indent=2).decode() + "\n"
        case _:
            return _table(bill)


def _places(path: Path) -> Iterator[Path]:
    """The run directories and completions files that `path` is or holds."""
    if path.is_file() or RunDirectory(path).summary.exists():
        yield path
        return
    found = sorted(summary.parent for summary in path.rglob("summary.json")) if path.is_dir() else []
    if not found:
        raise InputError(f"{path}: no run here; name a run directory, a folder of them, or a completions file")
    yield from found


def _read(place: Path) -> _Account:
    try:
        if place.is_file():
            footer = read_footer(place)
            if footer is None:
                raise InputError(f"{place}: holds no bill of batchrun's in its footer")
            return msgspec.convert(footer, _Account)
        return msgspec.json.decode(RunDirectory(place).summary.read_bytes(), type=_Account)
    except (msgspec.DecodeError, OSError) as error:
        raise InputError(f"{place}: the summary can't be read: {error}") from error


def _as_they_stand(account: _Account) -> list[TotalsLine]:
    """The totals with each row counted once, however often it was settled: the earliest lines of a status lose those
    that were asked again. What was used and cost stays.
    """
    if account.by_status is None:
        return account.totals
    gone = {status: -rows for status, rows in account.by_status.items()}
    for line in account.totals:
        gone[line.status] = gone.get(line.status, 0) + line.rows
    lines = []
    for line in sorted(account.totals, key=lambda line: line.invocation):
        lost = max(0, min(line.rows, gone[line.status]))
        gone[line.status] -= lost
        lines.append(msgspec.structs.replace(line, rows=line.rows - lost))
    return lines


def _key(key: str, account: _Account, line: TotalsLine) -> str:
    match key:
        case "day":
            return account.begun_at[:10] or "unknown"
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


def _rows(bill: Bill) -> Iterator[tuple[str, ...]]:
    yield (*bill.by, *FIGURES)
    for line in bill.lines:
        values = (_figure(line, name) for name in FIGURES)
        yield (*line.group, *("" if value is None else str(value) for value in values))


def _csv(bill: Bill) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_guarded(cell) for cell in row] for row in _rows(bill))
    return text.getvalue()


def _guarded(cell: str) -> str:
    """The cell as text even for a spreadsheet, which would run what begins like a formula."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _tree(bill: Bill) -> dict[str, object]:
    lines = [
        {**dict(zip(bill.by, line.group, strict=True)), **{name: _figure(line, name) for name in FIGURES}}
        for line in bill.lines
    ]
    total = {name: _figure(bill.total, name) for name in FIGURES}
    doubts = {
        "possibly_billed": bill.possibly_billed,
        "possibly_billed_usd": bill.possibly_billed_usd,
        "lost": bill.lost,
        "without_usage": bill.without_usage,
    }
    return {"runs": bill.runs, "by": bill.by, "lines": lines, "total": total, **doubts}


_SHOWN = ("rows", "attempts", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "wasted_usd")


def _table(bill: Bill) -> str:
    """Columns in line, numbers to the right, the sum last."""
    header = (*bill.by, *_SHOWN)
    body = [(*line.group, *_cells(line)) for line in bill.lines]
    body.append(("total", *[""] * (len(bill.by) - 1), *_cells(bill.total)))
    widths = [max(len(row[column]) for row in (header, *body)) for column in range(len(header))]
    names = len(bill.by)
    lines = [
        "  ".join(
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *body)
    ]
    return "\n".join([*lines, *_remarks(bill)]) + "\n"


def _cells(line: BillLine) -> list[str]:
    return [_cell(_figure(line, name)) for name in _SHOWN]


def _cell(value: int | Decimal | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.6f}" if isinstance(value, Decimal) else f"{value:,}"


def _figure(line: BillLine, name: str) -> int | Decimal | None:
    """None for a cost of which nothing is known."""
    if name == "cost_usd":
        return known_cost(line.cost_usd, line.unpriced + line.without_usage)
    value: int | Decimal = getattr(line, name)
    return value


def _remarks(bill: Bill) -> Iterator[str]:
    if bill.possibly_billed:
        yield (
            f"possibly billed beyond that: {plural(bill.possibly_billed, 'attempt')} without a known end, "
            f"at most ${bill.possibly_billed_usd:,.6f}"
        )
    if bill.lost:
        yield lost_in_words(bill.lost)
    if bill.total.unpriced:
        yield f"no known price for {plural(bill.total.unpriced, 'attempt')}: not in cost_usd"
    for missing in bill.without_usage:
        yield (
            f"without usage: {plural(missing.answers, 'answer')} of {missing.job}, not in cost_usd; "
            f"about {missing.offline_prompt_tokens:,} tokens in, {missing.offline_completion_tokens:,} out "
            "by an offline count"
        )
