"""What follows an attempt: its row is settled, retried or held, and its slot is free once its record is durable."""

import asyncio
import random
from collections.abc import Sequence

import msgspec

from batchrun import attempt_caps
from batchrun.dispatch.anomalies import Anomalies
from batchrun.dispatch.attempt_result import AttemptResult, add_costs
from batchrun.dispatch.backlog import Backlog, Invalid, Pending
from batchrun.dispatch.last_rows import LastRows
from batchrun.dispatch.retries import Retries
from batchrun.dispatch.serving import Serving
from batchrun.dispatch.store import OpenRun
from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.limits.admission import Decision, Stop
from batchrun.limits.circuit import PROCEED
from batchrun.limits.gates import AnyGate
from batchrun.records import CompletionRecord, Correction, Ending, Status, Verdict
from batchrun.request.builder import corrected
from batchrun.row_status import PLAIN, Settlement


class _Uncommitted(msgspec.Struct, frozen=True):
    """An attempt whose record is not durable yet: the slot to free then, and the row's retry, if it has one."""

    result: AttemptResult
    slot: int | None
    retry: Pending | None = None
    due_s: float = 0.0


class Endings:
    """Puts the record of each attempt on the checkpoint's queue. `on_commit` must be called after each commit.

    `long_wait` is the stop by the last Retry-After that was longer than the job allows.
    """

    def __init__(
        self, job: Job, open_run: OpenRun, gate: AnyGate, backlog: Backlog, last_rows: LastRows, serving: Serving
    ) -> None:
        """Must be called within the event loop."""
        self._job = job
        self._open_run = open_run
        self._checkpoint = open_run.store.checkpoint
        self._slots = open_run.slots
        self._gate = gate
        self._backlog = backlog
        self._last_rows = last_rows
        self._serving = serving
        self._clock = asyncio.get_running_loop().time
        self._uncommitted: dict[tuple[int, int], _Uncommitted] = {}
        self._held: dict[int, AttemptResult] = {}
        self.long_wait: Stop | None = None
        self.retries = Retries(self._clock)
        self.anomalies = Anomalies(
            quota_patience_s=job.retry.max_wait_s,
            resumed=open_run.store.plan.resumed,
            retried=self._checkpoint.has_reopened,
        )

    def end(self, result: AttemptResult, decision: Decision, slot: int, successes: int) -> None:
        """The attempt's record is on the checkpoint's queue, or its row is held. `successes` is the gate's count of
        good answers as it was sent.
        """
        if result.settlement is PLAIN and decision is PROCEED:  # nearly all attempts end here
            self._complete(result, slot, Status.OK)
            return
        row, judgement = result.pending.request.row, result.judgement
        if decision.own or decision.elsewhere:
            self._release_held(decision, row)
        if result.settlement is not None:
            self._settle_answer(result, result.settlement, slot)
        elif row in decision.own:  # a verdict that is the run's elsewhere, and is known to be a row's here
            self._hold(result, slot)
            self._settle_held(row)
        elif decision.hold and not self._is_refused_again(result):
            self._hold(result, slot)
        elif row in decision.elsewhere:
            self._retry(_as_free(result), slot, successes)
        elif judgement.verdict is Verdict.ROW or decision.hold or self._last_rows.gives_up(result.history):
            self._complete(result, slot, Status.FILTERED if judgement.filtered else Status.ERROR)
        else:
            self._retry(result, slot, successes)

    def on_commit(self, endings: Sequence[Ending]) -> None:
        """The endings are durable: their slots are free, rows are settled or wait for their retry."""
        spent: list[tuple[int, int | None, int | None]] = []
        settled, is_kept = 0, self._gate.budget.is_kept
        for ending in endings:
            n = ending.attempts if isinstance(ending, CompletionRecord) else ending.n
            attempt = self._uncommitted.pop((ending.row, n), None)
            if attempt is None:
                continue  # the record of a held attempt, whose slot was freed when it was held
            if attempt.slot is not None:
                self._slots.clear(attempt.slot)
                pico_usd, tokens = attempt.result.used() if is_kept else (None, None)
                spent.append((attempt.slot, pico_usd, tokens))
            if attempt.retry is not None:
                self._backlog.retry(attempt.retry, attempt.due_s)
                continue
            self._open_run.settled(ending, attempt.result.pending.chunk, attempt.result.answer)
            settled += 1
        self._backlog.done(settled)
        self._gate.release_all(spent)

    def record_held(self) -> None:
        """The attempts of rows that are still held are on the checkpoint's queue; the rows stay pending."""
        for result in self._held.values():
            self._checkpoint.put(result.discarded())
        self._held.clear()

    def record_if_held(self, row: int) -> None:
        """The same for a row that was held and is sent again."""
        if (held := self._held.pop(row, None)) is not None:
            self._checkpoint.put(held.discarded())

    def _release_held(self, decision: Decision, row: int) -> None:
        """Settles or retries the rows held earlier that this attempt of `row` has decided about."""
        for own in decision.own:
            self._settle_held(own)
        for other in decision.elsewhere:
            if other != row and (earlier := self._held.pop(other, None)) is not None:
                self._backlog.release(other)
                self._retry(_as_free(earlier), None, self._gate.successes)

    def _is_refused_again(self, result: AttemptResult) -> bool:
        """Whether this refusal is the row's own: no other row is left to confirm it, and the row was refused in an
        earlier start, too. So it is with a wrong key if other rows were answered.
        """
        pending, http_status = result.pending, result.attempt.http_status
        seen = pending.refused and http_status in (403, 429)
        seen |= pending.history.corroborated > 0 and result.judgement.is_wrong_key
        return seen and self._backlog.alone

    def _settle_answer(self, result: AttemptResult, settlement: Settlement, slot: int) -> None:
        """The answer settles its row, unless the job retries such answers."""
        if settlement.action != "retry" and not settlement.correctable:
            self._complete(result, slot, settlement.status)
            return
        pending = result.pending
        history = attempt_caps.after_unwanted_answer(result.history, settlement, self._job.retry)
        if history is not None and settlement.correctable and settlement.error is not None:
            new = Correction(result.answer_text, settlement.error.message or "")
            if new.answer in [each.answer for each in pending.corrections]:
                history = None  # a model that repeats its answer will repeat it a third time
            corrections = (*pending.corrections, new)
            answer = result.answer
            invalid = Invalid(result.attempt, settlement.error, answer.usage, result.cost_pico_usd, answer.service_tier)
            request = corrected(pending.request, [new])
            pending = msgspec.structs.replace(pending, request=request, corrections=corrections, invalid=invalid)
        if history is None:
            self._complete(result, slot, settlement.status)
        else:
            unwanted = msgspec.structs.replace(result, pending=pending, history=history)
            self._retry(unwanted, slot, self._gate.successes)

    def _settle_held(self, row: int) -> None:
        """A refusal that looked like the whole run's was this row's alone: the row fails, or is retried after a 429.

        A wrong key is never a row's: a gateway may have one among its keys. So it is retried, too, and counts.
        """
        result = self._held.pop(row, None)
        if result is None:
            return
        self._backlog.release(row)
        if result.attempt.http_status == 429:
            if result.judgement.verdict is Verdict.PAUSE:
                error = result.judgement.error
                self.long_wait = Stop(ExitCode.PAUSED, f"row {row}: {'429' if error is None else error.text}")
            self._retry(result, None, self._gate.successes)
            return
        if result.judgement.is_wrong_key:
            result = _as_free(result)
            history = attempt_caps.wrong_key(result.pending.history)
            result = msgspec.structs.replace(result, history=history)
            if not self._last_rows.gives_up(history):
                self._retry(result, None, self._gate.successes)
                return
        self._complete(result, None, Status.ERROR)

    def _complete(self, result: AttemptResult, slot: int | None, status: Status) -> None:
        """The row's completion is on the checkpoint's queue."""
        if result.pending.successes is not None:
            self.retries.drop(result.pending.request.row)
        completion = result.completion(status, self._checkpoint.invocation)
        self._uncommitted[completion.row, completion.attempts] = _Uncommitted(result, slot)
        self._checkpoint.put(completion)
        if (stop := self.anomalies.settled(completion.status, completion.error)) is not None:
            self._gate.close(stop)

    def _retry(self, result: AttemptResult, slot: int | None, successes: int) -> None:
        """The attempt's record is on the checkpoint's queue; once it is durable, the row waits for its retry."""
        history, judgement, row = result.history, result.judgement, result.pending.request.row
        retry = msgspec.structs.replace(
            result.pending,
            history=history,
            cost_pico_usd=add_costs(result.pending.cost_pico_usd, result.cost_pico_usd),
            successes=successes,
            waits_long=judgement.verdict is Verdict.PAUSE,
        )
        due_s = now_s = self._clock()
        if judgement.verdict is Verdict.OK:
            self.retries.drop(row)
        else:
            if judgement.is_capacity:
                due_s += self._serving.wait_s(history, judgement, random.random())
            else:
                due_s += attempt_caps.backoff_s(history, judgement.retry_after_s, self._job.retry, random.random())
            if retry.waits_long:
                due_s = max(due_s, now_s + (judgement.retry_after_s or 0.0))
            if self._last_rows.may_be_at_fault:
                wait_s = attempt_caps.end_wait_s(history, judgement, self._job.retry, self._backlog.waiting)
                due_s = max(due_s, now_s + wait_s)
            self.retries.put(row, history.attempts, judgement.error, due_s)
        discarded = result.discarded()
        if (set_aside := discarded.set_aside) is not None:
            retry = msgspec.structs.replace(retry, set_aside=(*retry.set_aside, set_aside))
        self._uncommitted[row, history.attempts] = _Uncommitted(result, slot, retry, due_s)
        self._checkpoint.put(discarded)

    def _hold(self, result: AttemptResult, slot: int) -> None:
        """The refusal is kept in memory until another row shows whether it concerns the whole run.

        It cost nothing, so its slot is free at once.
        """
        self._held[result.pending.request.row] = result
        self._slots.clear(slot)
        self._gate.release(slot, 0, 0)
        self._backlog.hold(msgspec.structs.replace(result.pending, history=result.history))


def _as_free(result: AttemptResult) -> AttemptResult:
    """The refusal concerned its endpoint or a key of it, not the row: the row can be sent again."""
    judgement = msgspec.structs.replace(result.judgement, verdict=Verdict.FREE, retry_after_s=None)
    return msgspec.structs.replace(result, judgement=judgement)
