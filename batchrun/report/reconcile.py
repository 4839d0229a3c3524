"""Compares runs with a provider's invoice, by request or by day and model. The invoice is held in memory, not rows."""

import csv
import re
from collections.abc import Iterator, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

import msgspec

from batchrun.errors import CheckpointError, InputError
from batchrun.money import usd_or_none
from batchrun.report import run_rows
from batchrun.report.runs import FoundRun
from batchrun.store import at_rest
from batchrun.store.rundir import RunDirectory

MOST_NAMED = 20  # items of each kind that are shown; all are counted

_ID = ("request_id", "x_request_id", "requestid", "request", "id", "custom_id")
_DAY = ("day", "date", "usage_date", "timestamp", "created_at", "created", "time")
_MODEL = ("model", "model_name", "model_id", "snapshot_id", "line_item")
_USD = ("cost_usd", "amount_usd", "usd", "cost", "amount", "amount_value", "total", "price", "spend", "charge")


_Billed = tuple[str, Decimal | None]
"""One billed item, by its request id or by its day and model, and its cost; None: unknown here."""


class Difference(msgspec.Struct, frozen=True):
    """An item that both have, at different amounts."""

    key: str
    here_usd: Decimal
    there_usd: Decimal


class Reconciled(msgspec.Struct):
    """An invoice compared with the runs. `by`: `request` or `day and model`. The named items are the first 20 of each.
    `unread` are runs whose rows can't be read.

    `doubtful` are items on the invoice that the runs name as possibly billed: neither missing nor in `cost_usd`.
    """

    by: str
    matched: int = 0
    here_usd: Decimal = Decimal(0)
    there_usd: Decimal = Decimal(0)
    different: int = 0
    difference_usd: Decimal = Decimal(0)
    missing_here: int = 0
    missing_here_usd: Decimal = Decimal(0)
    missing_there: int = 0
    missing_there_usd: Decimal = Decimal(0)
    unpriced: int = 0
    doubtful: int = 0
    doubtful_usd: Decimal = Decimal(0)
    differences: list[Difference] = []
    only_there: list[str] = []
    only_here: list[str] = []
    unread: list[str] = []


def reconcile(invoice: Path, runs: Sequence[FoundRun]) -> Reconciled:
    """The comparison.

    Raises:
        InputError: the invoice can't be read, or has no column of ids (or of days and models) and amounts.
    """
    by, there = _invoice(invoice)
    found = Reconciled(by, there_usd=sum(there.values(), Decimal(0)))
    for key, cost in _requests(runs) if by == "request" else _days(runs):
        found.here_usd += cost or 0
        billed = there.pop(key, None)
        if billed is None:
            if cost:
                found.missing_there += 1
                found.missing_there_usd += cost
                if len(found.only_here) < MOST_NAMED:
                    found.only_here.append(key)
        elif cost is None:
            found.unpriced += 1
        elif abs(cost - billed) <= _half_of_last_digit(billed):  # the invoice has our amount, as rounded there
            found.matched += 1
        else:
            found.different += 1
            found.difference_usd += billed - cost
            if len(found.differences) < MOST_NAMED:
                found.differences.append(Difference(key, cost, billed))
    doubts = {doubt.request_id for each in runs for doubt in each.account.possibly_billed if doubt.request_id}
    doubtful = [there.pop(key) for key in list(there) if key in doubts]
    found.doubtful, found.doubtful_usd = len(doubtful), sum(doubtful, Decimal(0))
    found.missing_here, found.missing_here_usd = len(there), sum(there.values(), Decimal(0))
    found.only_there = list(there)[:MOST_NAMED]
    if by == "request":  # the items of runs without readable rows are on the invoice and missing here
        found.unread = [str(each.place) for each in runs if run_rows.result_of(each.place) is None]
    return found


def _half_of_last_digit(amount: Decimal) -> Decimal:
    exponent = amount.as_tuple().exponent
    return Decimal(1).scaleb(exponent) / 2 if isinstance(exponent, int) and exponent < 0 else Decimal("0.5")


def _invoice(path: Path) -> tuple[str, dict[str, Decimal]]:
    """What identifies a line (a request, or a day and model), and the sum of the amounts by it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            names = {re.sub(r"\W+", "_", name.strip().lower()).strip("_"): name for name in lines.fieldnames or ()}
            usd, by_id, day, model = (
                next((names[name] for name in wanted if name in names), None) for wanted in (_USD, _ID, _DAY, _MODEL)
            )
            if usd is None or (by_id is None and (day is None or model is None)):
                raise InputError(
                    f"{path}: expected a column of amounts (cost_usd, amount, …) and one of request ids "
                    f"(request_id, …), or of days and models; it has {', '.join(names.values()) or 'none'}"
                )
            amounts: dict[str, Decimal] = {}
            for line in lines:
                # a line that is too short has None in its last columns
                texts = [(line[name] or "").strip() for name in ([by_id] if by_id else [day, model]) if name]
                key = texts[0] if by_id else f"{texts[0][:10]} {texts[1]}"
                amounts[key] = amounts.get(key, Decimal(0)) + _amount(line[usd], path, lines.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: can't be read as CSV: {error}") from error
    return ("request" if by_id else "day and model"), amounts


def _amount(text: str | None, path: Path, number: int) -> Decimal:
    try:
        amount = Decimal((text or "").strip().removeprefix("$").replace(",", ""))
    except InvalidOperation as error:
        raise InputError(f"{path}:{number}: {text!r} is not an amount") from error
    if not amount.is_finite():
        raise InputError(f"{path}:{number}: {text!r} is not an amount")
    return amount


def _days(found: Sequence[FoundRun]) -> Iterator[_Billed]:
    costs: dict[str, Decimal] = {}
    unknown: set[str] = set()
    for each in found:
        for line in each.account.totals:
            key = f"{line.day} {line.model}"
            costs[key] = costs.get(key, Decimal(0)) + line.cost_usd
            if line.unpriced or line.without_usage:
                unknown.add(key)
    for key, cost in sorted(costs.items()):
        yield key, None if key in unknown else cost


def _requests(found: Sequence[FoundRun]) -> Iterator[_Billed]:
    """Every attempt that was answered, also if its answer is not in the output."""
    for each in found:
        if (result := run_rows.result_of(each.place)) is not None:
            for table in run_rows.tables(result, ["request_id", "answer_cost_usd", "prompt_tokens"]):
                columns = (table[name].to_pylist() for name in table.column_names)
                for id_, cost, tokens in zip(*columns, strict=True):
                    if id_ is not None and (cost is not None or tokens is not None):
                        yield str(id_), cost
        directory = RunDirectory(each.place)
        if not directory.checkpoint.exists():
            continue
        try:
            with at_rest.opened(directory.checkpoint, directory.inflight, quick=True) as checkpoint:
                for chunk in checkpoint.chunks():
                    for attempt in checkpoint.discarded(chunk):
                        if attempt.request_id is not None and attempt.usage is not None:
                            yield attempt.request_id, usd_or_none(attempt.cost_pico_usd)
        except CheckpointError as error:
            raise InputError(f"{each.place}: its attempts can't be read: {error}") from error


def in_words(found: Reconciled) -> Iterator[str]:
    yield f"by {found.by}: ${found.here_usd:,.6f} here, ${found.there_usd:,.6f} on the invoice"
    yield f"matched: {found.matched:,}"
    yield f"different amount: {found.different:,}, the invoice is ${found.difference_usd:,.6f} higher"
    yield from (f"  {each.key}: ${each.here_usd:,.6f} here, ${each.there_usd:,.6f} there" for each in found.differences)
    yield f"missing here: {found.missing_here:,}, ${found.missing_here_usd:,.6f}"
    yield from (f"  {key}" for key in found.only_there)
    yield f"missing there: {found.missing_there:,}, ${found.missing_there_usd:,.6f}"
    yield from (f"  {key}" for key in found.only_here)
    for place in found.unread:
        yield f"not read: {place} has no rows yet; batchrun export writes them"
    if found.unpriced:
        yield f"on the invoice, with an unknown price here: {found.unpriced:,}"
    if found.doubtful:
        yield f"possibly billed, and on the invoice: {found.doubtful:,}, ${found.doubtful_usd:,.6f}"
