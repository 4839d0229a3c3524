"""The cost of the runs at other prices: `report --reprice prices.toml`. PURE, except for reading it."""

import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from batchrun import prices
from batchrun.errors import JobError
from batchrun.job.settings import Price
from batchrun.money import to_usd
from batchrun.records import Usage
from batchrun.report.runs import FoundRun
from batchrun.report.wording import plural
from batchrun.run_summary import TotalsLine


def read(path: Path) -> dict[str, Price]:
    """Prices by model, as in a job: `[pricing."model"]` with `input` and `output` in USD per million tokens.

    Raises:
        JobError: the file can't be read, or has no such tables.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise JobError(f"--reprice {path}: can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"--reprice {path}: not valid TOML: {error}") from error
    try:
        found = msgspec.convert(tables.get("pricing"), dict[str, Price])
    except msgspec.ValidationError as error:
        raise JobError(f"--reprice {path}: [pricing.MODEL]: {error}") from error
    if not found:
        raise JobError(f"--reprice {path}: has no prices")
    return found


class Repriced(NamedTuple):
    """The runs at the new prices. `kept` tells people which attempts keep their cost, and why."""

    found: tuple[FoundRun, ...]
    kept: tuple[str, ...]


def repriced(found: Sequence[FoundRun], new: Mapping[str, Price]) -> Repriced:
    """The runs as if attempts of these models had those prices. Other models keep theirs.

    The prices do not depend on the prompt's size, so the cost of a sum of tokens is the sum of their costs, up to
    rounding at 12 decimals. They are prices of text: a line with answers that used more than text keeps its cost, and
    its unpriced attempts.
    """
    again = []
    kept: Counter[tuple[str, str]] = Counter()
    for each in found:
        totals = list(each.account.totals)
        for number, line in enumerate(totals):
            if line.model not in new:
                continue
            if each.account.unpriced_usage and (line.unpriced or line.reported_cost_usd):
                kept[line.model, ", ".join(each.account.unpriced_usage)] += line.attempts
            else:
                totals[number] = _line(line, new[line.model])
        again.append(each._replace(account=msgspec.structs.replace(each.account, totals=totals, estimate=None)))
    lines = (
        f"{plural(attempts, 'attempt')} of {model} kept the cost they had, since some used {used}, "
        "which these prices do not cover"
        for (model, used), attempts in sorted(kept.items())
    )
    return Repriced(tuple(again), tuple(lines))


def _line(line: TotalsLine, price: Price) -> TotalsLine:
    counts = (line.cached_tokens, line.reasoning_tokens, line.cache_write_tokens)
    usage = Usage(line.prompt_tokens, line.completion_tokens, line.total_tokens, *counts)
    table = prices.stated(line.model, msgspec.structs.replace(price, per_request=None), "")
    cost = to_usd(prices.cost(usage, table, line.service_tier or None) or 0)
    # a fee is paid for each answer; a line without tokens has none
    answered = line.attempts - line.without_usage if line.total_tokens else 0
    fee = price.per_request or Decimal(0)
    return msgspec.structs.replace(line, cost_usd=cost + fee * answered, unpriced=0)


def total(found: Sequence[FoundRun]) -> Decimal:
    """The known cost of the runs."""
    return sum((each.account.cost_usd for each in found), Decimal(0))
