"""The run's account: what its attempts used and cost, folded ending by ending. PURE.

Bill = Σ of the totals' lines, discarded attempts included. What may have been billed without an answer stands apart.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal

import msgspec

from batchrun.records import Completion, Discarded, Ending, OfflineCount, PossiblyBilled, TotalsLine, Usage

DISCARDED = "discarded"
"""The totals' status of attempts that were not their row's last: what they cost was spent in vain."""

MAX_NAMED = 1000
"""Possibly billed attempts that are listed one by one; all of them are counted and added."""


UNENDED = frozenset({"crash", "aborted"})
"""The causes of doubts about attempts that no line of the totals counts: they were sent, and nothing came of them."""

LOST = "lost"
"""The status of those attempts in a line of their own."""

SEVERAL = "several models"
"""In the place of a lost attempt's model, which its slot does not name, in a run that asks more than one."""


class Spent(msgspec.Struct, frozen=True):
    """What is durable of the run's account: replaced as a whole after each commit, so any thread may read it.

    `totals` are what happened, invocation by invocation, and only grow; `standing` counts the rows that have a
    completion now, by status: a row that is asked again leaves it until it is settled anew. `lost` counts by invocation
    the attempts of which nothing came because the process died or was stopped at once.
    """

    totals: dict[tuple[int, str, str], TotalsLine] = {}
    standing: dict[str, int] = {}
    answered_as: dict[str, int] = {}
    possibly_billed: tuple[PossiblyBilled, ...] = ()
    possibly_billed_count: int = 0
    possibly_billed_usd: Decimal = Decimal(0)
    possibly_billed_tokens: int = 0
    lost: dict[int, int] = {}

    def settled(self) -> int:
        """Rows that have their completion."""
        return sum(self.standing.values())

    def cost_usd(self) -> Decimal:
        """What was billed for certain."""
        return sum((line.cost_usd for line in self.totals.values()), Decimal(0))

    def mean_cost_usd(self) -> Decimal | None:
        """Of one row, what its discarded attempts cost included; None where nothing had a price. Rows that cost nothing
        are no measure of those to come, and rows that were given up since are one.
        """
        rows = sum(line.rows for line in self.totals.values() if line.cost_usd)
        return self.cost_usd() / rows if rows else None

    def tokens(self) -> int:
        """The most that attempts so far have used: what their usage says, and the bounds of those in doubt."""
        return sum(line.total_tokens for line in self.totals.values()) + self.possibly_billed_tokens

    def requests(self) -> int:
        """Attempts so far, those without a known end included."""
        return sum(line.attempts for line in self.lines())

    def lines(self) -> list[TotalsLine]:
        """The totals with the lost attempts in lines of their own: their attempts add up to those of the rows."""
        models = {line.model for line in self.totals.values()}
        model = models.pop() if len(models) == 1 else SEVERAL
        lost = [TotalsLine(invocation, model, LOST, attempts=attempts) for invocation, attempts in self.lost.items()]
        return [*self.totals.values(), *lost]


def doubt(ending: Ending, invocation: int) -> PossiblyBilled | None:
    """The ending's entry on the list of what may have been billed without an answer, if it belongs there."""
    if not ending.maybe_billed:
        return None
    n = ending.attempts if isinstance(ending, Completion) else ending.n
    kind = ending.error.kind if isinstance(ending, Completion) and ending.error else None
    cause = (ending.error_kind if isinstance(ending, Discarded) else kind) or "no answer"
    return PossiblyBilled(
        row=ending.row,
        n=n,
        key=ending.key.hex(),
        upper_bound_usd=ending.possibly_billed_usd,
        upper_bound_tokens=ending.possibly_billed_tokens,
        cause=cause,
        invocation=invocation,
        request_id=ending.request_id,
    )


def with_possibly_billed(spent: Spent, entries: Sequence[PossiblyBilled]) -> Spent:
    if not entries:
        return spent
    lost = dict(spent.lost)
    for entry in entries:
        if entry.cause in UNENDED:
            lost[entry.invocation] = lost.get(entry.invocation, 0) + 1
    return msgspec.structs.replace(
        spent,
        possibly_billed=(*spent.possibly_billed, *entries)[:MAX_NAMED],
        possibly_billed_count=spent.possibly_billed_count + len(entries),
        possibly_billed_usd=sum((e.upper_bound_usd or Decimal(0) for e in entries), spent.possibly_billed_usd),
        possibly_billed_tokens=spent.possibly_billed_tokens + sum(e.upper_bound_tokens or 0 for e in entries),
        lost=lost,
    )


def fold(spent: Spent, endings: Sequence[Ending], invocation: int) -> Spent:
    """The account with the endings added; lines that no ending touches stay the same objects."""
    totals = dict(spent.totals)
    standing = dict(spent.standing)
    answered_as = spent.answered_as
    for ending in endings:
        settled = isinstance(ending, Completion)
        status = str(ending.status) if isinstance(ending, Completion) else DISCARDED
        cost = ending.last_cost_usd if isinstance(ending, Completion) else ending.cost_usd
        key = (invocation, ending.model, status)
        totals[key] = _add(totals.get(key) or TotalsLine(*key), ending, cost, rows=int(settled))
        if settled:
            standing[status] = standing.get(status, 0) + 1
        if isinstance(ending, Completion) and ending.answered_model is not None:
            if answered_as is spent.answered_as:
                answered_as = dict(answered_as)
            answered_as[ending.answered_model] = answered_as.get(ending.answered_model, 0) + 1
    return msgspec.structs.replace(spent, totals=totals, standing=standing, answered_as=answered_as)


def moved(spent: Spent, leaving: Mapping[str, int], coming: Mapping[str, int] | None = None) -> Spent:
    """The account with rows counted under other statuses, or under none."""
    standing = dict(spent.standing)
    for status, rows in leaving.items():
        standing[status] = standing.get(status, 0) - rows
    for status, rows in (coming or {}).items():
        standing[status] = standing.get(status, 0) + rows
    return msgspec.structs.replace(spent, standing=standing)


def _add(line: TotalsLine, ending: Ending, cost: Decimal | None, *, rows: int) -> TotalsLine:
    usage, offline = ending.usage, ending.offline or OfflineCount(0, 0)
    used = usage or Usage(0, 0, 0)
    return TotalsLine(
        invocation=line.invocation,
        model=line.model,
        status=line.status,
        rows=line.rows + rows,
        attempts=line.attempts + 1,
        prompt_tokens=line.prompt_tokens + used.prompt_tokens,
        cached_tokens=line.cached_tokens + (used.cached_tokens or 0),
        completion_tokens=line.completion_tokens + used.completion_tokens,
        reasoning_tokens=line.reasoning_tokens + (used.reasoning_tokens or 0),
        total_tokens=line.total_tokens + used.total_tokens,
        cost_usd=line.cost_usd + (cost or 0),
        unpriced=line.unpriced + (usage is not None and cost is None),
        without_usage=line.without_usage + (usage is None and cost is None),
        offline_prompt_tokens=line.offline_prompt_tokens + offline.prompt_tokens,
        offline_completion_tokens=line.offline_completion_tokens + offline.completion_tokens,
        cache_write_tokens=line.cache_write_tokens + (used.cache_write_tokens or 0),
        reported_cost_usd=line.reported_cost_usd + (ending.reported_cost_usd or 0),
    )
