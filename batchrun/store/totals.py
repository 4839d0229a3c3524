"""The totals of a run: what its attempts used and cost. PURE.

An attempt is booked when it ends, under the status of the row that it settles, or as discarded. If another answer
replaces it later (a retry, an accepted change, a salvage), `replaced` moves it to discarded. So the sum of all lines,
the bill, never changes, and wasted is the cost of what is discarded. Requests that may have been billed without an
answer are counted apart.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from batchrun.money import to_usd, usd_or_none
from batchrun.records import (
    DAY_S,
    CompletionRecord,
    Discarded,
    Ending,
    PossiblyBilled,
    Restored,
    Usage,
    replaces,
    utc_day,
)
from batchrun.run_summary import LineKey, TotalsLine

DISCARDED = "discarded"
"""The status of attempts whose answers are not in the output."""

_KEYS = frozenset({"invocation", "model", "status", "day", "service_tier"})
FIGURES = tuple(name for name in TotalsLine.__struct_fields__ if name not in _KEYS)
"""The fields of a line that are added up."""

MAX_NAMED = 1000
"""How many possibly billed attempts are listed one by one; all are counted."""

LOST_CAUSES = frozenset({"crash", "aborted", "machine"})
"""Causes of possibly billed attempts without an ending, which no line of the totals counts."""

LOST = "lost"
"""The status of the lines with those attempts."""

SEVERAL = "several models"
"""The model of a lost attempt in a run with more than one model: its slot does not store which."""


class Unstated(msgspec.Struct, frozen=True):
    """The upper bounds, added up, of answers without usage or price that are not listed as possibly billed.

    They are in no bill, but a budget cap counts them, even one that only a later start sets.
    """

    usd: Decimal = Decimal(0)
    tokens: int = 0


UNSTATED = "unstated"
"""The manifest entry that holds it."""


class Totals(msgspec.Struct, frozen=True):
    """The durable totals. A new object after each commit, so any thread may read it.

    `booked` has the attempts by invocation, and its figures only grow; `replaced` has the changes, negative ones too,
    by answers that were replaced later. `standing` counts the rows that have a completion, by status, without rows that
    are being sent again. `lost` counts, by invocation, the attempts in flight when the process died or was stopped at
    once.
    """

    booked: dict[LineKey, TotalsLine] = {}
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
        """The bill of the present output: its rows add up to the output's; other attempts are discarded or lost."""
        lines = dict(self.booked)
        for key, change in self.replaced.items():
            lines[key] = plus(lines.get(key) or TotalsLine(*key), change)
        lines_with_figures = [line for line in lines.values() if any(getattr(line, name) for name in FIGURES)]
        return [*lines_with_figures, *self._lost_lines()]

    def _lost_lines(self) -> list[TotalsLine]:
        """The lost attempts. Their day is the last one on which another attempt of their invocation ended."""
        models = {line.model for line in self.booked.values()}
        model = models.pop() if len(models) == 1 else SEVERAL
        days: dict[int, str] = {}
        for line in self.booked.values():
            days[line.invocation] = max(line.day, days.get(line.invocation, ""))
        return [
            TotalsLine(invocation, model, LOST, days.get(invocation, ""), attempts=attempts)
            for invocation, attempts in self.lost.items()
        ]

    def wasted_usd(self) -> Decimal:
        """The certain cost of answers that are not in the output."""
        return sum((line.cost_usd for line in self.lines() if line.status == DISCARDED), Decimal(0))

    def cost_usd(self) -> Decimal:
        """The certain cost."""
        return sum((line.cost_usd for line in self.booked.values()), Decimal(0))

    def mean_cost_usd(self) -> Decimal | None:
        """The mean cost of a sent row that cost something, discarded attempts included; None without a known price."""
        rows = sum(line.rows - line.reused for line in self.booked.values() if line.cost_usd)
        return self.cost_usd() / rows if rows else None

    def tokens(self) -> int:
        """The most tokens that attempts can have used so far: their usage, and bounds for those without."""
        lines = self.booked.values()
        stated = sum(max(line.total_tokens, line.prompt_tokens + line.completion_tokens) for line in lines)
        return stated + self.possibly_billed_tokens + self.unstated.tokens

    def most_usd(self) -> Decimal:
        """The most that attempts can have cost so far: the certain cost, and bounds for the rest."""
        return self.cost_usd() + self.possibly_billed_usd + self.unstated.usd

    def requests(self) -> int:
        """Attempts so far, lost ones included."""
        return sum(line.attempts for line in self.lines())


def possibly_billed(ending: Ending, invocation: int) -> PossiblyBilled:
    """The entry in the list of possibly billed requests of an attempt that may have been billed."""
    n = ending.attempts if isinstance(ending, CompletionRecord) else ending.n
    kind = ending.error.kind if isinstance(ending, CompletionRecord) and ending.error else None
    cause = (ending.error_kind if isinstance(ending, Discarded) else kind) or "no answer"
    return PossiblyBilled(
        row=ending.row,
        n=n,
        key=ending.key.hex(),
        upper_bound_usd=usd_or_none(ending.possibly_billed_pico_usd),
        upper_bound_tokens=ending.possibly_billed_tokens,
        cause=cause,
        invocation=invocation,
        request_id=ending.request_id,
    )


def with_possibly_billed(totals: Totals, entries: Sequence[PossiblyBilled]) -> Totals:
    """The totals with these entries added."""
    if not entries:
        return totals
    lost = dict(totals.lost)
    for entry in entries:
        if entry.cause in LOST_CAUSES:
            lost[entry.invocation] = lost.get(entry.invocation, 0) + 1
    return msgspec.structs.replace(
        totals,
        possibly_billed=(*totals.possibly_billed, *entries)[:MAX_NAMED],
        possibly_billed_count=totals.possibly_billed_count + len(entries),
        possibly_billed_usd=sum((e.upper_bound_usd or Decimal(0) for e in entries), totals.possibly_billed_usd),
        possibly_billed_tokens=totals.possibly_billed_tokens + sum(e.upper_bound_tokens or 0 for e in entries),
        lost=lost,
    )


def fold(
    totals: Totals, endings: Sequence[Ending], invocation: int, earlier: Mapping[int, TotalsLine] | None = None
) -> Totals:
    """The totals with the endings added; lines that no ending changes stay the same objects.

    `earlier` has, for each row that had a record before, what its earlier answer alone used and cost.
    """
    booked = dict(totals.booked)
    by_line: dict[_Line, list[Ending]] = {}
    for ending in endings:
        by_line.setdefault(_line(ending), []).append(ending)
    for (model, status, day, service_tier), of_line in by_line.items():
        key = invocation, model, str(status), utc_day(day * DAY_S), service_tier
        booked[key] = _with_endings(booked.get(key) or TotalsLine(*key), of_line)
    completions = [ending for ending in endings if isinstance(ending, CompletionRecord)]
    statuses: list[str] = [completion.status for completion in completions]
    changes: list[TotalsLine] = []
    for place, completion in enumerate(completions):
        if completion.restored is not None:
            changes += _restored(completion, completion.restored, invocation)
        if earlier and (before := earlier.get(completion.row)) is not None:
            changes += _second_answer(answer_line(completion, invocation), before)
            if not replaces(completion.status, before.status):
                statuses[place] = before.status
    standing = _with_counts(totals.standing, statuses)
    answered_as = _with_counts(totals.answered_as, [each.answered_model for each in completions])
    unstated = _with_unstated(totals.unstated, endings)
    folded = msgspec.structs.replace(
        totals, booked=booked, standing=standing, answered_as=answered_as, unstated=unstated
    )
    return with_changes(folded, changes) if changes else folded


def _with_counts(known: Mapping[str, int], names: Iterable[str | None]) -> dict[str, int]:
    """The counts with one more for each of these names."""
    counts = dict(known)
    for name, count in Counter(names).items():
        if name is not None:
            counts[str(name)] = counts.get(name, 0) + count
    return counts


def with_carried(totals: Totals, lines: Mapping[int, TotalsLine], earlier: Mapping[int, TotalsLine]) -> Totals:
    """The totals with rows that took their answer without a request: by row, each as a line that counts it.

    `earlier` has, for each row among them that had a record before, what its answer alone used and cost.
    """
    if not lines:
        return totals
    booked, standing = dict(totals.booked), dict(totals.standing)
    changes: list[TotalsLine] = []
    sums: dict[LineKey, list[TotalsLine]] = {}
    for row, line in lines.items():
        sums.setdefault(line.key, []).append(line)
        status = line.status
        if (before := earlier.get(row)) is not None:
            changes += _second_answer(line, before)
            status = status if replaces(status, before.status) else before.status
        standing[status] = standing.get(status, 0) + 1
    for key, of_line in sums.items():
        known = booked.get(key) or TotalsLine(*key)
        booked[key] = msgspec.structs.replace(
            known,
            rows=known.rows + len(of_line),
            reused=known.reused + len(of_line),
            duplicates=known.duplicates + sum(line.duplicates for line in of_line),
            saved_usd=sum((line.saved_usd for line in of_line), known.saved_usd),
        )
    folded = msgspec.structs.replace(totals, booked=booked, standing=standing)
    return with_changes(folded, changes) if changes else folded


def _with_unstated(known: Unstated, endings: Iterable[Ending]) -> Unstated:
    pico_usd, tokens = 0, known.tokens
    for ending in endings:
        if ending.maybe_billed:
            continue  # its bounds are in the list of possibly billed requests
        if (ending.last_cost_pico_usd if isinstance(ending, CompletionRecord) else ending.cost_pico_usd) is None:
            pico_usd += ending.possibly_billed_pico_usd or 0
        if ending.offline is not None:  # an answer came, and no usage
            tokens += ending.possibly_billed_tokens
    return known if not pico_usd and tokens == known.tokens else Unstated(known.usd + to_usd(pico_usd), tokens)


def with_changes(totals: Totals, changes: Iterable[TotalsLine]) -> Totals:
    """The totals with the changes added to `replaced`."""
    replaced = dict(totals.replaced)
    for change in changes:
        replaced[change.key] = plus(replaced.get(change.key) or TotalsLine(*change.key), change)
    return totals if replaced == totals.replaced else msgspec.structs.replace(totals, replaced=replaced)


def moved_to_discarded(answer: TotalsLine) -> tuple[TotalsLine, TotalsLine]:
    """The changes that move an answer to discarded; `answer` is what it alone used and cost, with the key of its line.

    If it counts as a row, it no longer does.
    """
    discarded = msgspec.structs.replace(answer, status=DISCARDED, rows=0, reused=0, duplicates=0, saved_usd=Decimal(0))
    return negative(answer), discarded


def row_counts_again(answer: TotalsLine) -> TotalsLine:
    """The change by which the row of a reopened answer counts again."""
    return TotalsLine(*answer.key, rows=1)


def answer_line(c: CompletionRecord, invocation: int) -> TotalsLine:
    """What the row's answer alone used and cost, with the key of the line that it is booked in."""
    restored = c.restored
    usage, cost = (c.usage, c.last_cost_pico_usd) if restored is None else (restored.usage, restored.cost_pico_usd)
    reported = c.reported_cost_pico_usd if restored is None else None
    key = invocation, c.model, str(c.status), utc_day(c.finished_at), c.service_tier
    return _used(TotalsLine(*key, rows=1), usage, cost, reported)


def plus(one: TotalsLine, other: TotalsLine) -> TotalsLine:
    """The line `one` with the figures of `other` added; a figure that only one of them has is taken as it is."""
    figures: dict[str, Any] = {}
    for name in FIGURES:
        a, b = getattr(one, name), getattr(other, name)
        figures[name] = a if b is None else b if a is None else a + b
    for name in ("cost_usd", "reported_cost_usd", "saved_usd"):
        figures[name] = figures[name] or Decimal(0)  # and no 0E-12
    return msgspec.structs.replace(one, **figures)


def negative(line: TotalsLine) -> TotalsLine:
    """The change that takes the line away."""
    figures = {name: -figure for name in FIGURES if (figure := getattr(line, name)) is not None}
    return msgspec.structs.replace(line, **figures)


_Line = tuple[str, str, int, str]
"""Model, status, UTC day since 1970, service tier: a line of one invocation. Its texts are made once a commit, because
`str` of a status and a day's name cost 1,800 instructions each."""


def _line(ending: Ending) -> _Line:
    """The line that the attempt is booked in."""
    if isinstance(ending, Discarded):
        return ending.model, DISCARDED, int(ending.at // DAY_S), ending.service_tier
    if ending.restored is not None:  # the last attempt, which brought no answer that could name a tier
        return ending.model, DISCARDED, int(ending.restored.last_at // DAY_S), ""
    return ending.model, ending.status, int(ending.finished_at // DAY_S), ending.service_tier


def _restored(c: CompletionRecord, restored: Restored, invocation: int) -> list[TotalsLine]:
    """The changes that move an earlier attempt, discarded so far, to the status of the row that it settles."""
    answer = answer_line(c, invocation)
    discarded = msgspec.structs.replace(answer, status=DISCARDED, rows=0)
    return [answer, negative(discarded)]


def _second_answer(new: TotalsLine, before: TotalsLine) -> list[TotalsLine]:
    """The changes for a row that had a record before: one of its two answers is discarded."""
    if replaces(new.status, before.status):
        return list(moved_to_discarded(msgspec.structs.replace(before, rows=0)))  # its row left when it was reopened
    return [*moved_to_discarded(new), row_counts_again(before)]


def _used(line: TotalsLine, usage: Usage | None, cost: int | None, reported: int | None) -> TotalsLine:
    """The line with one attempt's usage and cost in it, without the offline count, which stays where it was booked."""
    used = usage or Usage(0, 0, 0)
    return msgspec.structs.replace(
        line,
        attempts=1,
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens,
        completion_tokens=used.completion_tokens,
        reasoning_tokens=used.reasoning_tokens,
        total_tokens=used.total_tokens,
        cost_usd=to_usd(cost or 0),
        unpriced=int(usage is not None and cost is None),
        without_usage=int(usage is None and cost is None),
        cache_write_tokens=used.cache_write_tokens,
        reported_cost_usd=to_usd(reported or 0),
    )


def with_reopened(totals: Totals, answers: Iterable[TotalsLine]) -> Totals:
    """The totals with the rows of these answers pending again; each answer is valid until another replaces it."""
    standing, changes = dict(totals.standing), list[TotalsLine]()
    for answer in answers:
        standing[answer.status] = standing.get(answer.status, 0) - 1
        changes.append(TotalsLine(*answer.key, rows=-1))
    return with_changes(msgspec.structs.replace(totals, standing=standing), changes)


def _with_endings(line: TotalsLine, endings: Sequence[Ending]) -> TotalsLine:
    """The line with these attempts added: summed in local variables, so that a commit makes one new line."""
    rows = prompt = completion = total = unpriced = without_usage = 0
    cached, reasoning, written = line.cached_tokens, line.reasoning_tokens, line.cache_write_tokens
    offline_prompt = offline_completion = cost = reported = 0
    for ending in endings:
        if isinstance(ending, CompletionRecord):
            rows += ending.restored is None
            attempt_cost = ending.last_cost_pico_usd
        else:
            attempt_cost = ending.cost_pico_usd
        if attempt_cost is not None:
            cost += attempt_cost
        if ending.reported_cost_pico_usd is not None:
            reported += ending.reported_cost_pico_usd
        if ending.offline is not None:
            offline_prompt += ending.offline.prompt_tokens
            offline_completion += ending.offline.completion_tokens
        if (usage := ending.usage) is None:
            without_usage += attempt_cost is None
            continue
        unpriced += attempt_cost is None
        prompt += usage.prompt_tokens
        completion += usage.completion_tokens
        total += usage.total_tokens
        if usage.cached_tokens is not None:
            cached = (cached or 0) + usage.cached_tokens
        if usage.reasoning_tokens is not None:
            reasoning = (reasoning or 0) + usage.reasoning_tokens
        if usage.cache_write_tokens is not None:
            written = (written or 0) + usage.cache_write_tokens
    return TotalsLine(
        *line.key,
        rows=line.rows + rows,
        attempts=line.attempts + len(endings),
        prompt_tokens=line.prompt_tokens + prompt,
        cached_tokens=cached,
        completion_tokens=line.completion_tokens + completion,
        reasoning_tokens=reasoning,
        total_tokens=line.total_tokens + total,
        cost_usd=line.cost_usd + to_usd(cost),
        unpriced=line.unpriced + unpriced,
        without_usage=line.without_usage + without_usage,
        offline_prompt_tokens=line.offline_prompt_tokens + offline_prompt,
        offline_completion_tokens=line.offline_completion_tokens + offline_completion,
        cache_write_tokens=written,
        reported_cost_usd=line.reported_cost_usd + to_usd(reported),
        reused=line.reused,
        duplicates=line.duplicates,
        saved_usd=line.saved_usd,
    )
