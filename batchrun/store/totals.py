"""The run's account: what its attempts used and cost, folded ending by ending. PURE.

Bill = Σ of the totals' lines, discarded attempts included. What may have been billed without an answer stands apart.

An attempt is booked when it ends: under the status of the row that it settles, or as discarded. When another answer
takes the place of that one later (a retry, an accepted change, a salvage), `replaced` books it over, as discarded. So
the sum never changes, and wasted is one thing: the cost of what is discarded.
"""

from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import msgspec

from batchrun.records import (
    Completion,
    Discarded,
    Ending,
    LineKey,
    PossiblyBilled,
    Restored,
    TotalsLine,
    Usage,
    replaces,
    utc_day,
)

DISCARDED = "discarded"
"""The totals' status of attempts whose answers are not in the output: what they cost is wasted."""

FIGURES = tuple(name for name in TotalsLine.__struct_fields__ if name not in ("invocation", "model", "status", "day"))
"""The fields of a line that are added up."""

MAX_NAMED = 1000
"""Possibly billed attempts that are listed one by one; all of them are counted and added."""


UNENDED = frozenset({"crash", "aborted"})
"""The causes of doubts about attempts that no line of the totals counts: they were sent, and nothing came of them."""

LOST = "lost"
"""The status of those attempts in a line of their own."""

SEVERAL = "several models"
"""In the place of a lost attempt's model, which its slot does not name, in a run that asks more than one."""


class Unstated(msgspec.Struct, frozen=True):
    """The upper bounds, added up, of answers that state no usage or no price and are not on the list of doubts.

    No bill has them. A cap that a later start sets counts them, as one that was set from the beginning does.
    """

    usd: Decimal = Decimal(0)
    tokens: int = 0


UNSTATED = "unstated"
"""The manifest's entry that holds it."""


class Totals(msgspec.Struct, frozen=True):
    """What is durable of the run's account: replaced as a whole after each commit, so any thread may read it.

    `totals` are what happened, invocation by invocation, and only grow; `replaced` is what has to be added to them
    since answers were replaced, figures below 0 included. `standing` counts the rows that have a completion now, by
    status: a row that is asked again leaves it until it is settled again. `lost` counts by
    invocation the attempts of which nothing came because the process died or was stopped at once.
    """

    totals: dict[LineKey, TotalsLine] = {}
    replaced: dict[LineKey, TotalsLine] = {}
    standing: dict[str, int] = {}
    answered_as: dict[str, int] = {}
    possibly_billed: tuple[PossiblyBilled, ...] = ()
    possibly_billed_count: int = 0
    possibly_billed_usd: Decimal = Decimal(0)
    possibly_billed_tokens: int = 0
    lost: dict[int, int] = {}
    unstated: Unstated = Unstated()

    def settled(self) -> int:
        """Rows that have their completion."""
        return sum(self.standing.values())

    def lines(self) -> list[TotalsLine]:
        """The bill as the output stands: the rows add up to the output's, and what it doesn't hold is discarded."""
        lines = dict(self.totals)
        for key, change in self.replaced.items():
            lines[key] = plus(lines.get(key) or TotalsLine(*key), change)
        booked = [line for line in lines.values() if any(getattr(line, name) for name in FIGURES)]
        return [*booked, *self._lost_lines()]

    def _lost_lines(self) -> list[TotalsLine]:
        """The lost attempts in lines of their own: with them attempts add up to those of the rows. Their day is that on
        which their invocation was last heard of: the last one on which one of its attempts ended.
        """
        models = {line.model for line in self.totals.values()}
        model = models.pop() if len(models) == 1 else SEVERAL
        days: dict[int, str] = {}
        for line in self.totals.values():
            days[line.invocation] = max(line.day, days.get(line.invocation, ""))
        return [
            TotalsLine(invocation, model, LOST, days.get(invocation, ""), attempts=attempts)
            for invocation, attempts in self.lost.items()
        ]

    def wasted_usd(self) -> Decimal:
        """What was billed for answers that are not in the output, however they came to be replaced."""
        return sum((line.cost_usd for line in self.lines() if line.status == DISCARDED), Decimal(0))

    def cost_usd(self) -> Decimal:
        """What was billed for certain."""
        return sum((line.cost_usd for line in self.totals.values()), Decimal(0))

    def mean_cost_usd(self) -> Decimal | None:
        """Of one row, what its discarded attempts cost included; None where nothing had a price. Rows that cost nothing
        are no measure of those to come, and rows that were given up since are one.
        """
        rows = sum(line.rows - line.reused for line in self.totals.values() if line.cost_usd)
        return self.cost_usd() / rows if rows else None

    def tokens(self) -> int:
        """The most that attempts so far have used: what their usage says, and the bounds of those that state none."""
        lines = self.totals.values()
        stated = sum(max(line.total_tokens, line.prompt_tokens + line.completion_tokens) for line in lines)
        return stated + self.possibly_billed_tokens + self.unstated.tokens

    def most_usd(self) -> Decimal:
        """The most that attempts so far have cost: what is billed for certain, and the bounds of all else."""
        return self.cost_usd() + self.possibly_billed_usd + self.unstated.usd

    def requests(self) -> int:
        """Attempts so far, those without a known end included."""
        return sum(line.attempts for line in self.lines())


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


def with_possibly_billed(spent: Totals, entries: Sequence[PossiblyBilled]) -> Totals:
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


def fold(
    spent: Totals, endings: Sequence[Ending], invocation: int, earlier: Mapping[int, TotalsLine] | None = None
) -> Totals:
    """The account with the endings added; lines that no ending touches stay the same objects.

    `earlier` has, for each row among them that had a record before, what its answer alone used and cost.
    """
    totals = dict(spent.totals)
    standing = dict(spent.standing)
    answered_as = dict(spent.answered_as)
    changes: list[TotalsLine] = []
    by_line: dict[LineKey, list[Ending]] = {}
    for ending in endings:
        by_line.setdefault(_key(ending, invocation), []).append(ending)
        if not isinstance(ending, Completion):
            continue
        status = str(ending.status)
        if ending.restored is not None:
            changes += _restored(ending, ending.restored, invocation)
        if earlier and (before := earlier.get(ending.row)) is not None:
            changes += _again(answer_line(ending, invocation), before)
            status = status if replaces(status, before.status) else before.status
        standing[status] = standing.get(status, 0) + 1
        if ending.answered_model is not None:
            answered_as[ending.answered_model] = answered_as.get(ending.answered_model, 0) + 1
    for key, of_line in by_line.items():
        totals[key] = _added(totals.get(key) or TotalsLine(*key), of_line)
    unstated = _with_unstated(spent.unstated, endings)
    folded = msgspec.structs.replace(
        spent, totals=totals, standing=standing, answered_as=answered_as, unstated=unstated
    )
    return with_changes(folded, changes) if changes else folded


def carried(spent: Totals, lines: Mapping[int, TotalsLine], earlier: Mapping[int, TotalsLine]) -> Totals:
    """The account with rows that took their answer without a request: by row, each as a line that counts it.

    `earlier` has, for each row among them that had a record before, what its answer alone used and cost.
    """
    if not lines:
        return spent
    totals, standing = dict(spent.totals), dict(spent.standing)
    changes: list[TotalsLine] = []
    sums: dict[LineKey, list[TotalsLine]] = {}
    for row, line in lines.items():
        sums.setdefault(line.key, []).append(line)
        status = line.status
        if (before := earlier.get(row)) is not None:
            changes += _again(line, before)
            status = status if replaces(status, before.status) else before.status
        standing[status] = standing.get(status, 0) + 1
    for key, of_line in sums.items():
        known = totals.get(key) or TotalsLine(*key)
        totals[key] = msgspec.structs.replace(
            known,
            rows=known.rows + len(of_line),
            reused=known.reused + len(of_line),
            duplicates=known.duplicates + sum(line.duplicates for line in of_line),
            saved_usd=sum((line.saved_usd for line in of_line), known.saved_usd),
        )
    folded = msgspec.structs.replace(spent, totals=totals, standing=standing)
    return with_changes(folded, changes) if changes else folded


def _with_unstated(known: Unstated, endings: Sequence[Ending]) -> Unstated:
    usd, tokens = known.usd, known.tokens
    for ending in endings:
        if ending.maybe_billed:
            continue  # by its bounds on the list of doubts
        if (ending.last_cost_usd if isinstance(ending, Completion) else ending.cost_usd) is None:
            usd += ending.possibly_billed_usd or 0
        if ending.offline is not None:  # an answer came, and no usage
            tokens += ending.possibly_billed_tokens
    return known if (usd, tokens) == (known.usd, known.tokens) else Unstated(usd, tokens)


def with_changes(spent: Totals, changes: Iterable[TotalsLine]) -> Totals:
    """The account with the changes added to `replaced`."""
    replaced = dict(spent.replaced)
    for change in changes:
        replaced[change.key] = plus(replaced.get(change.key) or TotalsLine(*change.key), change)
    return spent if replaced == spent.replaced else msgspec.structs.replace(spent, replaced=replaced)


def given_up(answer: TotalsLine) -> tuple[TotalsLine, TotalsLine]:
    """The changes that book an answer over as discarded; `answer` is what it alone used and cost, where it is booked.

    Its row, if it counts one, counts no more.
    """
    discarded = msgspec.structs.replace(answer, status=DISCARDED, rows=0, reused=0, duplicates=0, saved_usd=Decimal(0))
    return _negative(answer), discarded


def settled_still(answer: TotalsLine) -> TotalsLine:
    """The change by which the row of a reopened answer counts again."""
    return TotalsLine(*answer.key, rows=1)


def answer_line(c: Completion, invocation: int) -> TotalsLine:
    """What the row's answer alone used and cost, in the line of the totals that it is booked in."""
    restored = c.restored
    usage, cost = (c.usage, c.last_cost_usd) if restored is None else (restored.usage, restored.cost_usd)
    reported = c.reported_cost_usd if restored is None else None
    return _used(TotalsLine(invocation, c.model, str(c.status), utc_day(c.finished_at), rows=1), usage, cost, reported)


def plus(one: TotalsLine, other: TotalsLine) -> TotalsLine:
    """The line `one` with the figures of `other` added."""
    figures = {name: getattr(one, name) + getattr(other, name) for name in FIGURES}
    for name in ("cost_usd", "reported_cost_usd", "saved_usd"):
        figures[name] = figures[name] or Decimal(0)  # and no 0E-12
    return msgspec.structs.replace(one, **figures)


def _negative(line: TotalsLine) -> TotalsLine:
    return msgspec.structs.replace(line, **{name: -getattr(line, name) for name in FIGURES})


def _key(ending: Ending, invocation: int) -> LineKey:
    """The line that the attempt is booked in."""
    if isinstance(ending, Discarded):
        return invocation, ending.model, DISCARDED, utc_day(ending.at)
    if ending.restored is not None:
        return invocation, ending.model, DISCARDED, utc_day(ending.restored.last_at)
    return invocation, ending.model, str(ending.status), utc_day(ending.finished_at)


def _restored(c: Completion, restored: Restored, invocation: int) -> list[TotalsLine]:
    """The changes that book an earlier attempt, discarded so far, under the status of the row that it settles."""
    answer = answer_line(c, invocation)
    discarded = msgspec.structs.replace(answer, status=DISCARDED, rows=0)
    return [answer, _negative(discarded)]


def _again(new: TotalsLine, before: TotalsLine) -> list[TotalsLine]:
    """The changes where a row is settled that had a record before: one of the two answers is given up.

    The old one's row counts no more since it was reopened.
    """
    if replaces(new.status, before.status):
        return list(given_up(msgspec.structs.replace(before, rows=0)))
    return [*given_up(new), settled_still(before)]


def _used(line: TotalsLine, usage: Usage | None, cost: Decimal | None, reported: Decimal | None) -> TotalsLine:
    """The line with one attempt's usage and cost in it, besides the offline count, which stays where it was booked."""
    used = usage or Usage(0, 0, 0)
    return msgspec.structs.replace(
        line,
        attempts=1,
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens or 0,
        completion_tokens=used.completion_tokens,
        reasoning_tokens=used.reasoning_tokens or 0,
        total_tokens=used.total_tokens,
        cost_usd=cost or Decimal(0),
        unpriced=int(usage is not None and cost is None),
        without_usage=int(usage is None and cost is None),
        cache_write_tokens=used.cache_write_tokens or 0,
        reported_cost_usd=reported or Decimal(0),
    )


def reopened(spent: Totals, answers: Iterable[TotalsLine]) -> Totals:
    """The account with the rows of these answers pending again; each stands until another takes its place."""
    standing, changes = dict(spent.standing), list[TotalsLine]()
    for answer in answers:
        standing[answer.status] = standing.get(answer.status, 0) - 1
        changes.append(TotalsLine(*answer.key, rows=-1))
    return with_changes(msgspec.structs.replace(spent, standing=standing), changes)


def _added(line: TotalsLine, endings: Sequence[Ending]) -> TotalsLine:
    """The line with these attempts in it: sums in plain variables, and one new line a commit."""
    rows = prompt = cached = completion = reasoning = total = unpriced = without_usage = written = 0
    offline_prompt = offline_completion = 0
    cost, reported = line.cost_usd, line.reported_cost_usd
    for ending in endings:
        if isinstance(ending, Completion):
            rows += ending.restored is None
            attempt_usd = ending.last_cost_usd
        else:
            attempt_usd = ending.cost_usd
        if attempt_usd is not None:
            cost += attempt_usd
        if ending.reported_cost_usd is not None:
            reported += ending.reported_cost_usd
        if ending.offline is not None:
            offline_prompt += ending.offline.prompt_tokens
            offline_completion += ending.offline.completion_tokens
        if (usage := ending.usage) is None:
            without_usage += attempt_usd is None
            continue
        unpriced += attempt_usd is None
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        total += usage.total_tokens
        cached += usage.cached_tokens or 0
        reasoning += usage.reasoning_tokens or 0
        written += usage.cache_write_tokens or 0
    return TotalsLine(
        *line.key,
        rows=line.rows + rows,
        attempts=line.attempts + len(endings),
        prompt_tokens=line.prompt_tokens + prompt,
        cached_tokens=line.cached_tokens + cached,
        completion_tokens=line.completion_tokens + completion,
        reasoning_tokens=line.reasoning_tokens + reasoning,
        total_tokens=line.total_tokens + total,
        cost_usd=cost,
        unpriced=line.unpriced + unpriced,
        without_usage=line.without_usage + without_usage,
        offline_prompt_tokens=line.offline_prompt_tokens + offline_prompt,
        offline_completion_tokens=line.offline_completion_tokens + offline_completion,
        cache_write_tokens=line.cache_write_tokens + written,
        reported_cost_usd=reported,
        reused=line.reused,
        duplicates=line.duplicates,
        saved_usd=line.saved_usd,
    )
