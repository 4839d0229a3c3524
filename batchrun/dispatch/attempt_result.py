"""How one attempt of a row ended, and the records that are made of it. PURE."""

from collections.abc import Sequence
from decimal import Decimal

import msgspec

from batchrun import prices
from batchrun.attempt_caps import History
from batchrun.dispatch.backlog import Pending
from batchrun.job.answer_schema import KINDS
from batchrun.policy import Judgement, Settlement
from batchrun.prices import PriceTable
from batchrun.records import (
    Answer,
    Attempt,
    Completion,
    Discarded,
    OfflineCount,
    Restored,
    RowError,
    SetAside,
    Status,
    Verdict,
)
from batchrun.response import token_count
from batchrun.response.usage import LITELLM_COST, cost_in_headers

NOTHING = Decimal(0)


class Ended(msgspec.Struct, frozen=True):
    """One attempt's end, with all that settling its row or asking it again needs.

    `settlement` is what a usable answer makes of the row, None where there is none. `cost_usd` is this attempt's alone:
    0 where no answer came, None where one came that can't be priced. `maybe_billed`: it may have cost something that
    no usage states, at most `bound_usd` for `bound_tokens`.
    """

    pending: Pending
    attempt: Attempt
    answer: Answer
    judgement: Judgement
    settlement: Settlement | None
    history: History
    bound_usd: Decimal | None
    cost_usd: Decimal | None
    maybe_billed: bool
    reported_cost_usd: Decimal | None = None
    bound_tokens: int = 0

    @property
    def error(self) -> RowError | None:
        """Why there is no usable answer, or what is odd about it: readable only leniently (then `raw` is kept)."""
        settled = None if self.settlement is None else self.settlement.error
        if (error := self.judgement.error or settled) is None and self.answer.flagged:
            status = self.attempt.http_status
            return RowError("not_strict_json", status, None, "the answer was read leniently; see `raw`")
        return error

    @property
    def said(self) -> str:
        """What the model said, as a message of its own: calls as the JSON that they are."""
        call = self.answer.function_call
        if call is not None:
            return msgspec.json.encode(call).decode()
        return self.answer.tool_calls or self.answer.content or ""

    def spent(self) -> tuple[Decimal | None, int | None]:
        """USD and tokens to book against the budget; None books the whole reservation."""
        if self.maybe_billed:
            return None, None
        if (usage := self.answer.usage) is None:
            return self.cost_usd, None if self.judgement.verdict is Verdict.OK else 0
        return self.cost_usd, usage.prompt_tokens + usage.billed_output_tokens

    def completion(self, status: Status, invocation: int) -> Completion:
        """The row's final record. No answer that there was is given up for none."""
        pending, attempt, error = self.pending, self.attempt, self.error
        cost_usd, restored = self.cost_usd, None
        if self.settlement is None and (invalid := pending.invalid) is not None:
            attempt, error, status, cost_usd = invalid.attempt, invalid.error, Status.INVALID, invalid.cost_usd
            restored = Restored(invalid.usage, invalid.cost_usd, self._ended_at)
        return Completion(
            row=pending.request.row,
            key=pending.request.key,
            status=status,
            attempts=self.history.attempts,
            http_status=attempt.http_status,
            error=error,
            request_id=attempt.request_id,
            finished_at=attempt.started_at + attempt.latency_s,
            latency_s=attempt.latency_s,
            time_to_first_token_s=attempt.time_to_first_token_s,
            model=pending.request.model,
            answered_model=self.answer.model if self.judgement.verdict is Verdict.OK else None,
            usage=self.answer.usage,
            cost_usd=together(pending.cost_usd, self.cost_usd),
            last_cost_usd=self.cost_usd,
            maybe_billed=self.maybe_billed,
            possibly_billed_usd=self.bound_usd,
            raw=attempt.body,
            variant=pending.variant,
            possibly_billed_tokens=self.bound_tokens,
            in_json=self.settlement is not None and self.settlement.in_json,
            offline=self._offline(),
            reported_cost_usd=self.reported_cost_usd if restored is None else None,  # it is of another answer then
            invocation=invocation,
            answer_cost_usd=cost_usd,
            restored=restored,
            set_aside=pending.set_aside if restored is None else _without_last_invalid(pending.set_aside),
        )

    def discarded(self) -> Discarded:
        """The record of an attempt that is not its row's last."""
        error = self.error or RowError("unknown")
        request = self.pending.request
        return Discarded(
            row=request.row,
            n=self.history.attempts,
            verdict=self.judgement.verdict,
            counted=self.history.counted > self.pending.history.counted,
            http_status=self.attempt.http_status,
            error_kind=error.kind,
            message=error.message,
            request_id=self.attempt.request_id,
            at=self._ended_at,
            model=request.model,
            usage=self.answer.usage,
            cost_usd=self.cost_usd,
            maybe_billed=self.maybe_billed,
            possibly_billed_usd=self.bound_usd,
            key=request.key,
            possibly_billed_tokens=self.bound_tokens,
            offline=self._offline(),
            reported_cost_usd=self.reported_cost_usd,
            said=self.said if self.judgement.verdict is Verdict.OK else None,
        )

    @property
    def _ended_at(self) -> float:
        return self.attempt.started_at + self.attempt.latency_s

    def _offline(self) -> OfflineCount | None:
        """A count of our own for an answer that came without usage."""
        if self.answer.usage is not None or self.judgement.verdict is not Verdict.OK:
            return None
        return token_count.count(self.pending.request.body, self.answer)


def _without_last_invalid(set_aside: tuple[SetAside, ...]) -> tuple[SetAside, ...]:
    """All but the answer that stands after all: the last one that the model was told of."""
    stands = max((each.attempt for each in set_aside if each.kind in KINDS), default=0)
    return tuple(each for each in set_aside if each.attempt != stands)


def remembered(earlier: Sequence[Discarded], begun: int) -> History:
    """What a row has been through, by the records of its attempts: what `caps.after` made of them as they ended.

    `begun` is the last attempt that is known to have been begun, ended or not.
    """
    counted = [attempt for attempt in earlier if attempt.counted]
    return History(
        attempts=max([begun, *(attempt.n for attempt in earlier)]),
        counted=len(counted),
        counted_5xx=sum((a.http_status or 0) >= 500 and a.verdict is not Verdict.SLOW for a in counted),
        maybe_billed=sum(attempt.verdict is Verdict.MAYBE for attempt in counted),
        witnessed=len(counted),
        corrected=sum(attempt.verdict is Verdict.OK and attempt.error_kind in KINDS for attempt in earlier),
    )


def cost_of(
    attempt: Attempt, answer: Answer, judgement: Judgement, table: PriceTable | None, reported_usd: Decimal | None
) -> Decimal | None:
    """What the attempt cost for certain: 0 where no answer came, None where one came that can't be priced.

    The price known comes first; `reported_usd`, what the server states, is the cost where there is none. A stated 0 is
    not: gateways state it of models for which they have no price.
    """
    if answer.usage is None and judgement.verdict is not Verdict.OK:
        return NOTHING if reported_usd is None else reported_usd
    known = prices.cost(answer.usage, table, answer.service_tier, attempt.started_at + attempt.latency_s)
    return (reported_usd or None) if known is None else known


def reported(attempt: Attempt, answer: Answer) -> Decimal | None:
    """USD that the server states for the answer, in it or in a header."""
    if answer.reported_cost_usd is not None:
        return answer.reported_cost_usd
    return cost_in_headers(attempt.headers) if LITELLM_COST in attempt.headers else None


def maybe_billed(answer: Answer, judgement: Judgement, cost_usd: Decimal | None, *, capped: bool) -> bool:
    """True when the attempt may have cost something that nothing states. An answer whose cost is unknown is on the list
    only under a cap that it counts in (`capped`), which must hold across starts; elsewhere it is counted as
    `without_usage`, or as `unpriced`.
    """
    if cost_usd:
        return False
    if answer.usage is not None:
        return cost_usd is None and capped
    return judgement.in_doubt or (judgement.verdict is Verdict.OK and capped)


def together(earlier: Decimal | None, cost: Decimal | None) -> Decimal | None:
    """The sum of two costs, or None where one is unknown."""
    return None if earlier is None or cost is None else earlier + cost


def total(costs: Sequence[Decimal | None]) -> Decimal | None:
    """The sum, or None where a part of it is unknown."""
    known = NOTHING
    for cost in costs:
        if cost is None:
            return None
        known += cost
    return known
