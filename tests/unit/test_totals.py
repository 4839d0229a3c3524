from collections.abc import Sequence
from decimal import Decimal
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from batchrun.money import to_usd
from batchrun.records import DAY_S, CompletionRecord, Ending, OfflineCount, PossiblyBilled, Status, Usage, utc_day
from batchrun.run_summary import TotalsLine
from batchrun.store.booking import MAX_NAMED, fold, possibly_billed, with_possibly_billed
from batchrun.store.totals import DISCARDED, LOST, Totals, Unstated
from tests.endings import MODEL, completion, discarded
from tests.money import pico
from tests.random_endings import ENDINGS

DAY = "2026-11-18"
"""On which the endings of `completion` and `discarded` are."""

PIECES = st.lists(st.integers(1, 7), min_size=30, max_size=30)


def in_pieces(endings: Sequence[Ending], sizes: Sequence[int]) -> Totals:
    spent, start = Totals(), 0
    for size in sizes:
        spent = fold(spent, endings[start : start + size], 1)
        start += size
    return spent


@given(ENDINGS, PIECES, st.randoms(use_true_random=False))
def test_totals_ignore_grouping_and_order(endings: list[Ending], sizes: list[int], random: Random) -> None:
    whole = fold(Totals(), endings, 1)
    assert in_pieces(endings, sizes) == whole
    shuffled = random.sample(endings, len(endings))
    assert fold(Totals(), shuffled, 1) == whole


def test_costs_are_spelled_alike_in_any_grouping() -> None:
    """Without spare zeros: 0.12 and 0.18 make 0.3."""
    endings = [completion(row, last_cost_pico_usd=pico(cost)) for row, cost in enumerate(("0.12", "0.18"))]
    for sizes in ([2], [1, 1]):
        (line,) = in_pieces(endings, sizes).booked.values()
        assert str(line.cost_usd) == "0.3"


@given(ENDINGS)
def test_totals_are_the_sum_of_results(endings: list[Ending]) -> None:
    spent = fold(Totals(), endings, 1)
    completions = [ending for ending in endings if isinstance(ending, CompletionRecord)]
    costs = [e.last_cost_pico_usd if isinstance(e, CompletionRecord) else e.cost_pico_usd for e in endings]
    assert spent.settled() == len(completions)
    assert spent.cost_usd() == to_usd(sum(filter(None, costs)))
    lines = spent.booked.values()
    assert sum(line.attempts for line in lines) == len(endings)
    assert sum(line.total_tokens for line in lines) == sum(e.usage.total_tokens for e in endings if e.usage)
    assert sum(line.unpriced for line in lines) == sum(
        e.usage is not None and cost is None for e, cost in zip(endings, costs, strict=True)
    )
    assert sum(line.without_usage for line in lines) == sum(
        e.usage is None and cost is None for e, cost in zip(endings, costs, strict=True)
    )
    counts = [e.offline for e in endings if e.offline is not None]
    assert sum(line.offline_prompt_tokens for line in lines) == sum(count.prompt_tokens for count in counts)
    assert sum(line.offline_completion_tokens for line in lines) == sum(count.completion_tokens for count in counts)
    assert sum(line.rows for line in lines if line.status == DISCARDED) == 0
    assert sum(spent.answered_as.values()) == sum(c.answered_model is not None for c in completions)


def test_the_mean_covers_rows_with_cost() -> None:
    def line(status: str, rows: int, cost_usd: str) -> TotalsLine:
        return TotalsLine(1, MODEL, status, rows=rows, attempts=rows, cost_usd=Decimal(cost_usd))

    assert Totals().mean_cost_usd() is None
    free = {(1, MODEL, "error", "", ""): line("error", 7, "0")}
    assert Totals(booked=free).mean_cost_usd() is None
    paid = {(1, MODEL, "ok", "", ""): line("ok", 20, "0.5"), (1, MODEL, DISCARDED, "", ""): line(DISCARDED, 0, "0.1")}
    assert Totals(booked=free | paid, standing={"ok": 10, "error": 7}).mean_cost_usd() == Decimal("0.03")


def test_an_untouched_line_is_the_same_object() -> None:
    before = fold(Totals(), [completion(0), discarded(1)], 1)
    after = fold(before, [completion(2)], 1)
    assert after.booked[1, MODEL, DISCARDED, DAY, ""] is before.booked[1, MODEL, DISCARDED, DAY, ""]
    assert after.booked[1, MODEL, "ok", DAY, ""].rows == 2
    assert before.booked[1, MODEL, "ok", DAY, ""].rows == 1


def test_each_invocation_has_lines_of_its_own() -> None:
    spent = fold(fold(Totals(), [completion(0)], 1), [completion(1)], 2)
    assert [(line.invocation, line.rows) for line in spent.booked.values()] == [(1, 1), (2, 1)]


def test_only_possibly_billed_attempts_count_so() -> None:
    lost = discarded(
        3, 2, maybe_billed=True, error_kind="timeout", possibly_billed_pico_usd=pico("0.5"), possibly_billed_tokens=700
    )
    assert possibly_billed(lost, 4) == PossiblyBilled(
        3, 2, lost.key.hex(), Decimal("0.5"), 700, "timeout", 4, "req-3-2"
    )
    answered = completion(3, maybe_billed=True, attempts=2, status=Status.ERROR)
    assert possibly_billed(answered, 1) == PossiblyBilled(
        3, 2, answered.key.hex(), None, 0, "no answer", 1, answered.request_id
    )


def test_every_possible_billing_is_counted() -> None:
    """Although not every one is listed."""
    entry = PossiblyBilled(0, 1, "00", Decimal("0.01"), 300, "crash", 1)
    unknown = PossiblyBilled(1, 1, "01", None, None, "timeout", 1)
    spent = with_possibly_billed(Totals(), [entry] * MAX_NAMED)
    spent = with_possibly_billed(spent, [unknown, entry])
    assert spent.possibly_billed == (entry,) * MAX_NAMED
    assert spent.possibly_billed_count == MAX_NAMED + 2
    assert spent.possibly_billed_usd == Decimal("0.01") * (MAX_NAMED + 1)
    assert spent.possibly_billed_tokens == spent.tokens() == 300 * (MAX_NAMED + 1)


def test_missing_usage_counts_by_bounds_once() -> None:
    offline = OfflineCount(9, 3)
    bounds: dict[str, Any] = {"possibly_billed_pico_usd": pico("0.5"), "possibly_billed_tokens": 700}
    silent = completion(0, usage=None, last_cost_pico_usd=None, offline=offline, **bounds)
    unpriced = completion(1, usage=Usage(10, 2, 12), last_cost_pico_usd=None, **bounds)
    stated = completion(2, usage=None, last_cost_pico_usd=pico("0.1"), offline=offline, **bounds)
    named = completion(3, usage=None, last_cost_pico_usd=None, offline=offline, maybe_billed=True, **bounds)
    refused = discarded(4, usage=None, cost_pico_usd=0, **bounds)
    spent = fold(Totals(), [silent, unpriced, stated, named, refused], 1)
    assert spent.unstated == Unstated(Decimal("1.0"), 1_400)
    assert (spent.tokens(), spent.most_usd()) == (12 + 1_400, Decimal("1.1"))


def test_running_totals_count_every_attempt_once() -> None:
    """Possibly billed attempts count by their bounds."""
    answered = completion(0, usage=Usage(10, 2, 12))
    refused = discarded(1)
    timed_out = discarded(2, maybe_billed=True, error_kind="timeout", possibly_billed_tokens=700)
    doubts = [possibly_billed(timed_out, 1), PossiblyBilled(3, 1, "00", None, 50, "crash", 1)]
    spent = fold(Totals(), [answered, refused, timed_out], 1)
    spent = with_possibly_billed(spent, doubts)
    assert (spent.requests(), spent.tokens()) == (4, 12 + 700 + 50)
    assert sum(line.attempts for line in spent.lines()) == 4
    (lost,) = (line for line in spent.lines() if line.status == LOST)
    assert lost == TotalsLine(1, answered.model, LOST, DAY, attempts=1)


def test_money_is_booked_on_its_day() -> None:
    """Of an invocation that spends before and after midnight UTC, each day has its own line."""
    midnight = 20_000 * DAY_S
    endings = [completion(0, finished_at=midnight - 0.5), completion(1, finished_at=midnight + 0.5)]
    lines = fold(Totals(), endings, 1).lines()
    assert [(line.day, line.rows) for line in lines] == [("2024-10-03", 1), ("2024-10-04", 1)]


def test_lost_attempts_have_their_starts_last_day() -> None:
    days = [DAY_S * number for number in (20_000, 20_001, 20_002)]
    spent = Totals()
    for at, invocation in zip(days, (1, 1, 2), strict=True):
        spent = fold(spent, [completion(at // DAY_S, finished_at=float(at))], invocation)
    lost = [PossiblyBilled(row, 1, "00", None, 50, "crash", invocation) for row, invocation in enumerate((1, 2, 3))]
    lines = [line for line in with_possibly_billed(spent, lost).lines() if line.status == LOST]
    assert [(line.invocation, line.day) for line in lines] == [(1, utc_day(days[1])), (2, utc_day(days[2])), (3, "")]
