"""Adds ended attempts to the totals of a run. PURE.

An attempt is booked when it ends, under the status of the row that it settles, or as discarded. If another answer
replaces it later (a retry, an accepted change, a salvage), `replaced` moves it to discarded. So the sum of all lines,
the bill, never changes, and wasted is the cost of what is discarded.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import msgspec

from batchrun.money import to_pico, to_usd, usd_or_none
from batchrun.records import DAY_S, CompletionRecord, Discarded, Ending, PossiblyBilled, Usage, replaces, utc_day
from batchrun.run_summary import LineKey, TotalsLine
from batchrun.store.totals import DISCARDED, Totals, Unstated, negative, plus

MAX_NAMED = 1000
"""How many possibly billed attempts are listed one by one; all are counted."""

LOST_CAUSES = frozenset({"crash", "aborted", "machine"})
"""Causes of possibly billed attempts without an ending, which no line of `booked` counts."""


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
            # an earlier attempt, discarded so far, moves to the status of the row that it settles
            answer = answer_line(completion, invocation)
            changes += [answer, negative(msgspec.structs.replace(answer, status=DISCARDED, rows=0))]
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
        cost_usd=to_usd(to_pico(line.cost_usd) + cost),
        unpriced=line.unpriced + unpriced,
        without_usage=line.without_usage + without_usage,
        offline_prompt_tokens=line.offline_prompt_tokens + offline_prompt,
        offline_completion_tokens=line.offline_completion_tokens + offline_completion,
        cache_write_tokens=written,
        reported_cost_usd=to_usd(to_pico(line.reported_cost_usd) + reported),
        reused=line.reused,
        duplicates=line.duplicates,
        saved_usd=line.saved_usd,
    )


def _second_answer(new: TotalsLine, before: TotalsLine) -> list[TotalsLine]:
    """The changes for a row that had a record before: one of its two answers is discarded."""
    if replaces(new.status, before.status):
        return list(moved_to_discarded(msgspec.structs.replace(before, rows=0)))  # its row left when it was reopened
    return [*moved_to_discarded(new), TotalsLine(*before.key, rows=1)]


def answer_line(c: CompletionRecord, invocation: int) -> TotalsLine:
    """What the row's answer alone used and cost, with the key of the line that it is booked in.

    It lacks the offline count, which stays where it was booked.
    """
    usage, cost, reported = c.usage, c.last_cost_pico_usd, c.reported_cost_pico_usd
    if c.restored is not None:  # the answer is an earlier attempt's, the record's own figures are the last one's
        usage, cost, reported = c.restored.usage, c.restored.cost_pico_usd, None
    used = usage or Usage(0, 0, 0)
    return TotalsLine(
        *(invocation, c.model, str(c.status), utc_day(c.finished_at), c.service_tier),
        rows=1,
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


def _with_counts(known: Mapping[str, int], names: Iterable[str | None]) -> dict[str, int]:
    """The counts with one more for each of these names."""
    counts = dict(known)
    for name, count in Counter(names).items():
        if name is not None:
            counts[str(name)] = counts.get(name, 0) + count
    return counts


def _with_unstated(known: Unstated, endings: Iterable[Ending]) -> Unstated:
    """The bounds with those of endings that state no cost or no usage; the same object if there is none."""
    pico_usd, tokens = 0, known.tokens
    for ending in endings:
        if ending.maybe_billed:
            continue  # its bounds are in the list of possibly billed requests
        if (ending.last_cost_pico_usd if isinstance(ending, CompletionRecord) else ending.cost_pico_usd) is None:
            pico_usd += ending.possibly_billed_pico_usd or 0
        if ending.offline is not None:  # an answer came, and no usage
            tokens += ending.possibly_billed_tokens
    return known if not pico_usd and tokens == known.tokens else Unstated(known.usd + to_usd(pico_usd), tokens)


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


def with_reopened(totals: Totals, answers: Iterable[TotalsLine]) -> Totals:
    """The totals with the rows of these answers pending again; each answer is valid until another replaces it."""
    standing, changes = dict(totals.standing), list[TotalsLine]()
    for answer in answers:
        standing[answer.status] = standing.get(answer.status, 0) - 1
        changes.append(TotalsLine(*answer.key, rows=-1))
    return with_changes(msgspec.structs.replace(totals, standing=standing), changes)


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


def possibly_billed(ending: Ending, invocation: int) -> PossiblyBilled:
    """The entry in the list of possibly billed requests of an attempt that may have been billed."""
    if isinstance(ending, CompletionRecord):
        n, kind = ending.attempts, None if ending.error is None else ending.error.kind
    else:
        n, kind = ending.n, ending.error_kind
    return PossiblyBilled(
        row=ending.row,
        n=n,
        key=ending.key.hex(),
        upper_bound_usd=usd_or_none(ending.possibly_billed_pico_usd),
        upper_bound_tokens=ending.possibly_billed_tokens,
        cause=kind or "no answer",
        invocation=invocation,
        request_id=ending.request_id,
    )
