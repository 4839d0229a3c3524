"""What is on record of a row's attempts says what the process knew that made them."""

from decimal import Decimal
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun import attempt_caps, policy, prices
from batchrun.attempt_caps import History
from batchrun.dispatch.attempt_result import AttemptResult, cost_of, history_of, maybe_billed
from batchrun.dispatch.backlog import Pending
from batchrun.job.answer_schema import KINDS
from batchrun.job.settings import Price, Retry
from batchrun.policy import Judgement
from batchrun.records import Answer, Attempt, Request, RowError, Usage, Verdict
from tests.money import pico

REQUEST = Request(7, b"k" * 16, b"{}", "m", 10, 10)
CHUNK = cast(Any, SimpleNamespace())

ATTEMPTS = st.sampled_from([200, 400, 429, 500, 502, 503, 504, 520, 529, None])
VERDICTS = st.sampled_from([Verdict.FREE, Verdict.MAYBE, Verdict.SLOW, Verdict.PAUSE])


def ended(pending: Pending, status: int | None, verdict: Verdict, *, corroborated: bool) -> AttemptResult:
    judgement = Judgement(verdict, RowError("server_error", status))
    history = attempt_caps.after(pending.history, judgement, corroborated=corroborated)
    attempt = Attempt(0.0, 0.1, status, {}, b"")
    return AttemptResult(pending, attempt, Answer(), judgement, None, history, None, None, maybe_billed=False)


@given(st.lists(st.tuples(ATTEMPTS, VERDICTS, st.booleans()), max_size=12), st.integers(0, 12))
def test_a_resumed_row_keeps_its_history(attempts: list[tuple[int | None, Verdict, bool]], known: int) -> None:
    pending, records = Pending(REQUEST, CHUNK), []
    for status, verdict, corroborated in attempts[:known]:
        one = ended(pending, status, verdict, corroborated=corroborated)
        records.append(one.discarded())
        pending = msgspec.structs.replace(pending, history=one.history)
    assert history_of(records, 0) == pending.history


def test_a_lost_attempt_only_has_its_number() -> None:
    assert history_of([], 3) == History(attempts=3)


def test_earlier_overloads_leave_a_row_its_attempts() -> None:
    pending, records = Pending(REQUEST, CHUNK), []
    for _ in range(4):
        one = ended(pending, 503, Verdict.SLOW, corroborated=True)
        records.append(one.discarded())
        pending = msgspec.structs.replace(pending, history=one.history)
    again = attempt_caps.after(
        history_of(records, 0), Judgement(Verdict.FREE, RowError("server_error", 500)), corroborated=True
    )
    assert not attempt_caps.exhausted(again, Retry(max_attempts=6, max_5xx=4))


@pytest.mark.parametrize(("tokens", "known"), [(1_000_000, True), (1_000_001, False)])
def test_no_attempt_costs_over_a_million(tokens: int, *, known: bool) -> None:
    """Such a count is an error of the server's, and its cost is unknown."""
    answer = Answer(completion=True, usage=Usage(tokens, 0, tokens))
    table = prices.stated("m", Price(input=Decimal(10**6), output=Decimal(0)), "2026-11-29")
    cost = cost_of(Attempt(0.0, 0.0, 200, {}, b""), answer, policy.ANSWERED, table, None)
    assert (cost == pico(10**6)) if known else cost is None


def test_missing_usage_counts_under_token_caps() -> None:
    """Only there is the answer's usage possibly unknown."""
    answered = Judgement(Verdict.OK)
    assert maybe_billed(Answer(completion=True), answered, None, capped=True)
    assert not maybe_billed(Answer(completion=True), answered, None, capped=False)
    assert maybe_billed(Answer(), Judgement(Verdict.MAYBE, RowError("timeout"), in_doubt=True), 0, capped=False)
    assert maybe_billed(Answer(), Judgement(Verdict.ROW, RowError("server_error", 504), in_doubt=True), 0, capped=False)
    assert not maybe_billed(Answer(), Judgement(Verdict.FREE, RowError("server_error", 500)), 0, capped=True)
    assert not KINDS & {"timeout", "server_error"}, "kinds of answers that are retried are no others"
