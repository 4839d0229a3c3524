"""The result of one attempt, and the records made from it. PURE."""

from collections.abc import Sequence

import msgspec

from batchrun import prices
from batchrun.attempt_caps import History
from batchrun.dispatch.backlog import Pending
from batchrun.job.answer_schema import KINDS
from batchrun.money import MAX_PICO_USD
from batchrun.policy import ANSWERED, CAPACITY, Judgement
from batchrun.prices import PriceTable
from batchrun.records import (
    OK,
    Answer,
    Attempt,
    CompletionRecord,
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
from batchrun.row_status import PLAIN, Settlement


class AttemptResult(msgspec.Struct, frozen=True):
    """One attempt with everything that settling or retrying its row needs.

    `settlement` is the row's status by a usable answer, None without one. `cost_pico_usd` is this attempt's alone: 0 if
    no answer came, None if an answer can't be priced. `maybe_billed`: it may have cost something that no usage states,
    at most `bound_pico_usd` for `bound_tokens`.
    """

    pending: Pending
    attempt: Attempt
    answer: Answer
    judgement: Judgement
    settlement: Settlement | None
    history: History
    bound_pico_usd: int | None
    cost_pico_usd: int | None
    maybe_billed: bool
    reported_cost_pico_usd: int | None = None
    bound_tokens: int = 0

    @property
    def error(self) -> RowError | None:
        """Why there is no usable answer, or why it is flagged: it was not strict JSON (then `raw` is kept)."""
        settled = None if self.settlement is None else self.settlement.error
        if (error := self.judgement.error or settled) is None and self.answer.flagged:
            status = self.attempt.http_status
            return RowError("not_strict_json", status, None, "the answer was read leniently; see `raw`")
        return error

    @property
    def answer_text(self) -> str:
        """The model's answer as the text of a message; function and tool calls as JSON."""
        call = self.answer.function_call
        if call is not None:
            return msgspec.json.encode(call).decode()
        return self.answer.tool_calls or self.answer.content or ""

    def used(self) -> tuple[int | None, int | None]:
        """10⁻¹² USD and tokens to book against the budget; None books the whole reservation."""
        if self.maybe_billed:
            return None, None
        if (usage := self.answer.usage) is None:
            return self.cost_pico_usd, None if self.judgement.verdict is OK else 0
        return self.cost_pico_usd, usage.prompt_tokens + usage.billed_output_tokens

    def completion(self, status: Status, invocation: int) -> CompletionRecord:
        """The row's final record."""
        pending, attempt, answer, settlement = self.pending, self.attempt, self.answer, self.settlement
        request, restored, cost, service_tier = pending.request, None, self.cost_pico_usd, answer.service_tier
        error = None if settlement is PLAIN and not answer.flagged else self.error
        if settlement is None and (invalid := pending.invalid) is not None:
            # a correction failed: the invalid answer before it is better than none
            attempt, error, status = invalid.attempt, invalid.error, Status.INVALID
            service_tier = invalid.service_tier
            restored = Restored(invalid.usage, invalid.cost_pico_usd, self._ended_at)
        # by place where the names are the same: msgspec looks for each name among all fields
        return CompletionRecord(
            request.row,
            request.key,
            status,
            self.history.attempts,
            attempt.http_status,
            error,
            attempt.request_id,
            attempt.started_at + attempt.latency_s,
            attempt.latency_s,
            attempt.time_to_first_token_s,
            request.model,
            answer.model if self.judgement is ANSWERED else None,
            answer.usage,
            cost_pico_usd=add_costs(pending.cost_pico_usd, cost),
            last_cost_pico_usd=cost,
            maybe_billed=self.maybe_billed,
            possibly_billed_pico_usd=self.bound_pico_usd if self.maybe_billed or cost is None else None,
            raw=attempt.body,
            variant=pending.variant,
            possibly_billed_tokens=self.bound_tokens,
            in_json=settlement is not None and settlement.in_json,
            offline=None if answer.usage is not None else self._offline(),
            # not of a restored answer: it is that of the last one
            reported_cost_pico_usd=self.reported_cost_pico_usd if restored is None else None,
            invocation=invocation,
            restored=restored,
            service_tier=service_tier or "",
            set_aside=pending.set_aside if restored is None else _without_last_invalid(pending.set_aside),
        )

    def discarded(self) -> Discarded:
        """The attempt's record if its row is retried or stays pending."""
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
            cost_pico_usd=self.cost_pico_usd,
            maybe_billed=self.maybe_billed,
            possibly_billed_pico_usd=self.bound_pico_usd,
            key=request.key,
            possibly_billed_tokens=self.bound_tokens,
            offline=self._offline(),
            reported_cost_pico_usd=self.reported_cost_pico_usd,
            said=self.answer_text if self.judgement.verdict is OK else None,
            service_tier=self.answer.service_tier or "",
        )

    @property
    def _ended_at(self) -> float:
        return self.attempt.started_at + self.attempt.latency_s

    def _offline(self) -> OfflineCount | None:
        """Tokens counted offline, for an answer without usage."""
        if self.answer.usage is not None or self.judgement.verdict is not OK:
            return None
        return token_count.count(self.pending.request.body, self.answer)


def _without_last_invalid(set_aside: tuple[SetAside, ...]) -> tuple[SetAside, ...]:
    """All but the answer that was restored: the last one that a correction was about."""
    restored = max((each.attempt for each in set_aside if each.kind in KINDS), default=0)
    return tuple(each for each in set_aside if each.attempt != restored)


def history_of(earlier: Sequence[Discarded], last_sent: int) -> History:
    """A row's history by the records of its attempts: the same as `attempt_caps.after` made of them as they ended.

    `last_sent` is the number of the last attempt known to be sent, whether it ended or not.
    """
    counted = [attempt for attempt in earlier if attempt.counted]
    return History(
        attempts=max([last_sent, *(attempt.n for attempt in earlier)]),
        counted=len(counted),
        counted_5xx=sum((a.http_status or 0) >= 500 and a.verdict is not Verdict.SLOW for a in counted),
        maybe_billed=sum(attempt.verdict is Verdict.MAYBE for attempt in counted),
        corroborated=len(counted),
        corrected=sum(attempt.verdict is OK and attempt.error_kind in KINDS for attempt in earlier),
        capacity_refusals=sum(attempt.error_kind == CAPACITY for attempt in earlier),
    )


def cost_of(
    attempt: Attempt, answer: Answer, judgement: Judgement, table: PriceTable | None, reported_pico_usd: int | None
) -> int | None:
    """The attempt's certain cost: 0 if no answer came, None if an answer can't be priced.

    Without a known price, the cost that the server reports counts. A price of the list is one of text; the job's own is
    for all that the model does.
    """
    if answer.usage is None and judgement.verdict is not OK:
        return 0 if reported_pico_usd is None else reported_pico_usd
    known = prices.cost(answer.usage, table, answer.service_tier, attempt.started_at + attempt.latency_s)
    covers_all = answer.billed_apart is None or (table is not None and table.every_tier)
    if known is None or known > MAX_PICO_USD or not covers_all:
        return reported_pico_usd or None  # gateways report 0 for models whose price they don't know
    return known


def reported(attempt: Attempt, answer: Answer) -> int | None:
    """The cost in USD that the server reports, in the answer or in a header."""
    if answer.reported_cost_pico_usd is not None:
        return answer.reported_cost_pico_usd
    return cost_in_headers(attempt.headers) if LITELLM_COST in attempt.headers else None


def maybe_billed(answer: Answer, judgement: Judgement, cost_pico_usd: int | None, *, capped: bool) -> bool:
    """True if the attempt may have cost something that is stated nowhere.

    An answer of unknown cost is listed as possibly billed only under a budget cap (`capped`), which must hold across
    starts. Otherwise it is counted as `without_usage` or `unpriced`.
    """
    if cost_pico_usd:
        return False
    if answer.usage is not None:
        return cost_pico_usd is None and capped
    return judgement.in_doubt or (judgement.verdict is OK and capped)


def add_costs(first: int | None, *others: int | None) -> int | None:
    """The sum, or None if one of them is unknown."""
    total = first
    if len(others) == 1 and total is not None and not total:
        return others[0]  # a row's first attempt
    for cost in others:
        if total is None or cost is None:
            return None
        total += cost
    return total
