"""The workers, and the five steps of one attempt: admit → write the slot → send → judge → settle or retry.

A fixed set of workers pulls rows; there is no task, future or timeout object per row.
"""

import asyncio
import functools
import random
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from batchrun import attempt_caps, policy, prices
from batchrun.dispatch.anomalies import Anomalies
from batchrun.dispatch.attempt_result import NOTHING, AttemptResult, add_costs, cost_of, maybe_billed, reported
from batchrun.dispatch.backlog import Backlog, Invalid, Pending
from batchrun.dispatch.cache_keys import NO_KEY, Key
from batchrun.dispatch.endpoints import Endpoints
from batchrun.dispatch.image_memory import ImageMemory
from batchrun.dispatch.last_rows import LastRows
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.requests import Requests, with_key
from batchrun.dispatch.retries import Retries
from batchrun.dispatch.serving import Serving
from batchrun.dispatch.store import OpenRun
from batchrun.errors import BatchrunError, ExitCode, InputError
from batchrun.job.job import Job
from batchrun.limits import forecast, overruns
from batchrun.limits.admission import Decision, Outcome, Stop
from batchrun.limits.gate import GateClosed
from batchrun.limits.gates import AnyGate
from batchrun.limits.probe_turns import InDoubt
from batchrun.policy import Settlement
from batchrun.records import Attempt, Completion, Correction, Ending, Request, Status, Verdict
from batchrun.request.builder import corrected
from batchrun.response import answer as answers


class _Uncommitted(msgspec.Struct, frozen=True):
    """An attempt whose record is not durable yet: the slot to free then, and the row's retry, if it has one."""

    result: AttemptResult
    slot: int | None
    retry: Pending | None = None
    due_s: float = 0.0


class Workers:
    """Sends every row of the backlog: call `work_all`. `on_commit` must be called after each commit.

    `failure` is the error that ends the run.
    """

    def __init__(
        self,
        job: Job,
        requests: Requests,
        gate: AnyGate,
        endpoints: Endpoints,
        open_run: OpenRun,
        learned: LearnedLimits,
    ) -> None:
        """Must be called within the event loop."""
        self._job = job
        self._requests = requests
        self.endpoints = endpoints
        self._open_run = open_run
        self._store = store = open_run.store
        self._checkpoint = store.checkpoint
        self._slots = open_run.slots
        self._clock = asyncio.get_running_loop().time
        self._image_memory = ImageMemory()
        self._uncommitted: dict[tuple[int, int], _Uncommitted] = {}
        self._held: dict[int, AttemptResult] = {}
        self._long_wait: Stop | None = None  # by the last Retry-After that was longer than the job allows
        self._capped = bool(job.budget.caps_usd) or job.budget.max_tokens is not None
        self.gate = gate
        self.learned = learned
        self.backlog = Backlog(
            store.open_next, requests.pending, self._clock, open_run.has_room, lambda: gate.successes
        )
        self._last_rows = LastRows(self.backlog, gate, job.retry, answered_before=store.was_answered)
        self.anomalies = Anomalies(
            quota_patience_s=job.retry.max_wait_s,
            resumed=store.plan.resumed,
            retried=store.checkpoint.has_reopened,
        )
        self.retries = Retries(self._clock)
        self.serving = Serving(job, store.plan.manifest.dialect, self._clock)
        self._unparked = asyncio.Event()
        self.failure: BaseException | None = None
        self._working: asyncio.Task[None] | None = None
        self.sent = self.refused = 0
        self.slow_s = 0.0  # nearly all responses are faster

    def resume(self, earlier: "Workers") -> None:
        """What the workers before these counted in this start counts on: they sent its canary."""
        self.sent += earlier.sent
        self.refused += earlier.refused
        before, now = earlier.anomalies, self.anomalies
        now.unknown_finish_reasons[:] = before.unknown_finish_reasons
        now.unpriced_tiers[:] = before.unpriced_tiers
        now.example_error = before.example_error

    async def work_all(self) -> None:
        """Returns when every pending row is settled, the gate has closed, or `cancel` was called."""

        async def work_together() -> None:
            async with asyncio.TaskGroup() as tasks:  # an exception of one worker is a bug and ends the others
                for number in range(self.gate.slots):
                    tasks.create_task(self.work(), name=f"worker-{number}")

        self._working = asyncio.create_task(work_together())
        await asyncio.wait([self._working])
        if self._working.cancelled():
            return
        error = self._working.exception()
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]  # the others are its consequences
        if error is not None:
            self.fail(error)

    def cancel(self) -> None:
        """Requests in flight are abandoned; their slots keep their names."""
        if self._working is not None:
            self._working.cancel()

    async def work(self) -> None:
        """Sends rows until none is left or the gate closes."""
        while True:
            probes = False if self.gate.turns.are_open else await self.gate.turns.take()
            if (pending := await self._next(probes=probes)) is None:
                self.gate.turns.end()
                return
            key = NO_KEY if self.serving.shares_no_prefix else await self._cache_key(pending, probes=probes)
            if key is None:
                continue
            request = pending.request
            try:
                slot = await self.gate.admit(self._requests.reservation(request), probes=probes)
            except GateClosed:
                self._unpark(key)
                self.backlog.close()
                return
            except InDoubt:
                self._put_back(pending)
                self._unpark(key)
                continue
            if probes:
                self.gate.turns.end()
            if request.pictures:
                await self._attempt_with_pictures(pending, slot, key)
            else:
                await self._attempt(pending, request, slot, key)

    def close(self, stop: Stop) -> None:
        """Nothing more is sent; requests in flight may end."""
        self.gate.close(stop)
        self.backlog.close()

    def fail(self, error: BaseException) -> None:
        """The run ends with this error: nothing more is sent."""
        if self.failure is None:
            self.failure = error
        self.close(Stop(error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL_ERROR, str(error)))
        if self._checkpoint.broken:
            self.cancel()  # there is no point in waiting for answers that can't be stored; the slots keep the names

    async def _next(self, *, probes: bool) -> Pending | None:
        """The next row to send; None when there is no other."""
        try:
            pending = await self.backlog.next(probes=probes)
        except BatchrunError as error:  # disk or input: admission ends, requests in flight may end
            self.fail(error)
            return None
        if pending is None and self.backlog.left_to_wait and self._long_wait is not None:
            self.gate.close(self._long_wait)
        if pending is not None and pending.successes is None:
            self._last_rows.started()
        return pending

    def _put_back(self, pending: Pending) -> None:
        """The row was not sent and is pending again."""
        if pending.successes is None:
            self._last_rows.tried()
        self.backlog.put_back(pending)

    async def _cache_key(self, pending: Pending, *, probes: bool) -> Key | None:
        """The key for the provider's prompt cache; None: the row was parked behind the first of its group."""
        while (key := self.serving.cache_key(pending, may_wait=not probes)) is None:
            if self.serving.park(pending):
                return None
            await self._unparked.wait()
        return key

    def _unpark(self, key: Key, *, answered: bool = False) -> None:
        """The request with this key has ended or was not sent: rows that were parked for it are pending again."""
        if self.serving.shares_no_prefix:
            return
        for pending in self.serving.ended(key, answered=answered):
            self._put_back(pending)
        self._unparked.set()
        self._unparked.clear()

    async def _attempt_with_pictures(self, pending: Pending, slot: int, key: Key) -> None:
        """Reads the row's images into the request's body, sends it, and frees the memory."""
        try:
            request = await self._image_memory.load(functools.partial(self._requests.with_pictures, pending))
        except InputError as error:
            self.gate.release(slot, NOTHING)
            self.fail(error)
            self._unpark(key)
            return
        if self.gate.stop is None:
            await self._attempt(with_key(pending, request.key), request, slot, key)
        else:  # the gate closed while this row waited for memory
            self.gate.release(slot, NOTHING)
            self._unpark(key)
        self._image_memory.release(request)

    async def _attempt(self, pending: Pending, request: Request, slot: int, key: Key) -> None:
        """Sends the row's request once and puts the attempt's record on the checkpoint's queue."""
        n = pending.history.attempts + 1
        if (held := self._held.pop(request.row, None)) is not None:
            self._checkpoint.put(held.discarded())
        bound = self.gate.bound(slot)
        # before the first byte is sent, so that a crash leaves no request unnamed
        self._slots.take(slot, request.row, n, request.key, *bound)
        successes = self.gate.successes
        self.sent += 1
        tier = self.serving.tier(pending)
        body = self.serving.body(request.body, tier, key)
        attempt = await self.endpoints.send(slot, body, self._store.attempt_id(request.row, n))
        if pending.successes is None:
            self._last_rows.tried()
        result, decision = self._judge(pending, attempt, slot, bound, successes, tier)
        judgement = result.judgement
        # a full tier is an answer as far as the backlog is concerned: the endpoint is well
        self.backlog.ended(pending, Verdict.ROW if judgement.is_capacity else judgement.verdict)
        self._unpark(key, answered=judgement.verdict is Verdict.OK)
        if (stop := self.serving.stop_for(judgement)) is not None:
            self.close(stop)
        for row in decision.own:
            self._settle_held(row)
        for row in decision.elsewhere:
            if row != request.row and (earlier := self._held.pop(row, None)) is not None:
                self.backlog.release(row)
                self._retry(_as_free(earlier), None, self.gate.successes)
        # the same refusal met before a restart, with no other row left to confirm it, is the row's own; so is a wrong
        # key while other rows were answered
        seen = pending.refused and attempt.http_status in (403, 429)
        seen |= pending.history.corroborated > 0 and attempt.http_status == 401
        refused_again = seen and self.backlog.alone
        if decision.hold and not refused_again:
            self._hold(result, slot)
        elif request.row in decision.elsewhere:
            self._retry(_as_free(result), slot, successes)
        elif result.settlement is not None:
            self._settle_answer(result, result.settlement, slot)
        elif result.judgement.verdict is Verdict.ROW or decision.hold or self._last_rows.gives_up(result.history):
            self._complete(result, slot, Status.FILTERED if result.judgement.filtered else Status.ERROR)
        else:
            self._retry(result, slot, successes)

    def _judge(
        self,
        pending: Pending,
        attempt: Attempt,
        slot: int,
        bound: tuple[Decimal | None, int],
        successes: int,
        tier: str | None,
    ) -> tuple[AttemptResult, Decision]:
        """The attempt's result with its cost, and what the gate decides about the run."""
        request, row = pending.request, pending.request.row
        self.slow_s = forecast.peak(self.slow_s, attempt.latency_s)
        answer = answers.read(attempt.body, request.choices)
        self.anomalies.note_finish_reason(answer.finish_reason)
        tier_may_be_full = tier is not None and tier not in prices.ORDINARY
        judgement = policy.judge(attempt, answer, self._job.retry, tier_may_be_full=tier_may_be_full)
        judgement = self.anomalies.escalate_quota(judgement, self._clock())
        if answer.usage is not None:
            self.learned.estimates.learn(request, answer.usage)
            if self.learned.overruns.learn(request, answer.usage):
                self._checkpoint.put_entry(overruns.ENTRY, self.learned.overruns.encode())
            self.gate.settle(slot, answer.usage.total_tokens, answer.usage.completion_tokens)
        if judgement.is_capacity:
            self.gate.settle(slot, 0)  # nothing was used, and the headers of a full tier tell nothing of our limits
        else:
            self.gate.read_headers(slot, attempt.headers)
        settlement: Settlement | None = None
        if judgement.verdict is Verdict.OK:
            decision = self.gate.observe(slot, Outcome(row, Verdict.OK))
            history = attempt_caps.answered(pending.history)
            settlement = policy.settlement(answer, request.expected, self._job.finish, attempt.http_status)
            self._last_rows.answered(after_failure=pending.history.attempts > 0)
        else:
            self.refused += judgement.verdict is Verdict.SLOW
            reached = attempt.error is None or attempt.error.sent
            is_last = reached and self._last_rows.only_failed_left
            at_end = judgement.is_chargeable and is_last
            refused_again = is_last and judgement.is_refusal and pending.history.refused_alone > 0
            doubted = judgement.is_retried and self.backlog.is_doubted(row)
            # such a failure is no evidence about the endpoint
            elsewhere = judgement.error is not None and judgement.error.kind in policy.NO_EVIDENCE
            no_evidence = at_end or refused_again or doubted or elsewhere or judgement.is_capacity
            outcome = Outcome(row, judgement.verdict, judgement.error, judgement.retry_after_s, no_evidence)
            decision = self.gate.observe(slot, outcome)
            before = successes if pending.successes is None else pending.successes
            corroborated = reached and self.gate.successes > before
            history = attempt_caps.after(pending.history, judgement, corroborated=corroborated, at_end=at_end)
            history = attempt_caps.refused(history, judgement, corroborated=corroborated, at_end=is_last)
        self._last_rows.ended(history, judgement)
        reported_usd = reported(attempt, answer)
        table = self._requests.price(request.model)
        cost_usd = cost_of(attempt, answer, judgement, table, reported_usd)
        if cost_usd is None and table is not None and prices.lacks_tier(table, answer.service_tier):
            self.anomalies.note_unpriced_tier(answer.service_tier)
        in_doubt = maybe_billed(answer, judgement, cost_usd, capped=self._capped)
        bound_usd, bound_tokens = bound
        parts = pending, attempt, answer, judgement, settlement, history
        return AttemptResult(*parts, bound_usd, cost_usd, in_doubt, reported_usd, bound_tokens), decision

    def on_commit(self, endings: Sequence[Ending]) -> None:
        """The endings are durable: their slots are free, rows are settled or wait for their retry."""
        spent: list[tuple[int, Decimal | None, int | None]] = []
        for ending in endings:
            n = ending.attempts if isinstance(ending, Completion) else ending.n
            attempt = self._uncommitted.pop((ending.row, n), None)
            if attempt is None:
                continue  # the record of a held attempt, whose slot was freed when it was held
            if attempt.slot is not None:
                self._slots.clear(attempt.slot)
                spent.append((attempt.slot, *attempt.result.used()))
            if attempt.retry is not None:
                self.backlog.retry(attempt.retry, attempt.due_s)
                continue
            self._open_run.settled(ending, attempt.result.pending.chunk)
            self.backlog.done()
        self.gate.release_all(spent)

    def record_held(self) -> None:
        """The attempts of rows that are still held are on the checkpoint's queue; the rows stay pending."""
        for result in self._held.values():
            self._checkpoint.put(result.discarded())
        self._held.clear()

    def _settle_answer(self, result: AttemptResult, settlement: Settlement, slot: int) -> None:
        """The answer settles its row, unless the job retries such answers."""
        pending = result.pending
        history = attempt_caps.after_unwanted_answer(result.history, settlement, self._job.retry)
        if history is not None and settlement.correctable and settlement.error is not None:
            new = Correction(result.answer_text, settlement.error.message or "")
            if any(new.answer == each.answer for each in pending.corrections):
                history = None  # a model that repeats its answer will repeat it a third time
            corrections = (*pending.corrections, new)
            answer = result.answer
            invalid = Invalid(result.attempt, settlement.error, answer.usage, result.cost_usd, answer.service_tier)
            request = corrected(pending.request, [new])
            pending = msgspec.structs.replace(pending, request=request, corrections=corrections, invalid=invalid)
        if history is None:
            self._complete(result, slot, settlement.status)
        else:
            unwanted = msgspec.structs.replace(result, pending=pending, history=history)
            self._retry(unwanted, slot, self.gate.successes)

    def _settle_held(self, row: int) -> None:
        """A refusal that looked like the whole run's was this row's alone: the row fails, or is retried after a 429.

        A wrong key is never a row's: a gateway may have one among its keys. So it is retried, too, and counts.
        """
        result = self._held.pop(row, None)
        if result is None:
            return
        self.backlog.release(row)
        if result.attempt.http_status == 429:
            if result.judgement.verdict is Verdict.PAUSE:
                error = result.judgement.error
                self._long_wait = Stop(ExitCode.PAUSED, f"row {row}: {'429' if error is None else error.text}")
            self._retry(result, None, self.gate.successes)
            return
        if result.attempt.http_status == 401:
            result = _as_free(result)
            history = attempt_caps.after(result.pending.history, result.judgement, corroborated=True)
            result = msgspec.structs.replace(result, history=history)
            if not self._last_rows.gives_up(history):
                self._retry(result, None, self.gate.successes)
                return
        self._complete(result, None, Status.ERROR)

    def _complete(self, result: AttemptResult, slot: int | None, status: Status) -> None:
        """The row's completion is on the checkpoint's queue."""
        self.retries.drop(result.pending.request.row)
        completion = result.completion(status, self._checkpoint.invocation)
        self._uncommitted[completion.row, completion.attempts] = _Uncommitted(result, slot)
        self._checkpoint.put(completion)
        if (stop := self.anomalies.settled(completion.status, completion.error)) is not None:
            self.gate.close(stop)

    def _retry(self, result: AttemptResult, slot: int | None, successes: int) -> None:
        """The attempt's record is on the checkpoint's queue; once it is durable, the row waits for its retry."""
        history, judgement, row = result.history, result.judgement, result.pending.request.row
        retry = msgspec.structs.replace(
            result.pending,
            history=history,
            cost_usd=add_costs(result.pending.cost_usd, result.cost_usd),
            successes=successes,
            waits_long=judgement.verdict is Verdict.PAUSE,
        )
        due_s = now_s = self._clock()
        if judgement.verdict is Verdict.OK:
            self.retries.drop(row)
        else:
            if judgement.is_capacity:
                due_s += self.serving.wait_s(history, judgement, random.random())
            else:
                due_s += attempt_caps.backoff_s(history, judgement.retry_after_s, self._job.retry, random.random())
            if retry.waits_long:
                due_s = max(due_s, now_s + (judgement.retry_after_s or 0.0))
            if self._last_rows.only_failed_left:
                wait_s = attempt_caps.end_wait_s(history, judgement, self._job.retry, self.backlog.waiting)
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
        self.gate.release(slot, NOTHING, 0)
        self.backlog.hold(msgspec.structs.replace(result.pending, history=result.history))


def _as_free(result: AttemptResult) -> AttemptResult:
    """The refusal concerned its endpoint or a key of it, not the row: the row can be sent again."""
    judgement = msgspec.structs.replace(result.judgement, verdict=Verdict.FREE, retry_after_s=None)
    return msgspec.structs.replace(result, judgement=judgement)
