"""The workers, and the life of one attempt.

    admit → write the slot → send → judge → observe → settle, hold or retry

`Workers` is about the first five steps, `Endings` about the last. A fixed set of workers pulls rows; there is no task,
future or timeout object per row.
"""

import asyncio
import functools

from batchrun import attempt_caps, policy, prices, row_status
from batchrun.attempt_caps import History
from batchrun.dispatch.anomalies import add_once
from batchrun.dispatch.attempt_result import AttemptResult, cost_of, maybe_billed, reported
from batchrun.dispatch.backlog import Backlog, Pending
from batchrun.dispatch.cache_keys import NO_KEY, Key
from batchrun.dispatch.endings import Endings
from batchrun.dispatch.endpoints import Endpoints
from batchrun.dispatch.image_memory import ImageMemory
from batchrun.dispatch.last_rows import LastRows
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.requests import Requests, with_key
from batchrun.dispatch.serving import Serving
from batchrun.dispatch.store import OpenRun
from batchrun.errors import BatchrunError, ExitCode, InputError
from batchrun.job.job import Job
from batchrun.limits import forecast, overruns
from batchrun.limits.admission import Decision, Outcome, Stop
from batchrun.limits.gate import GateClosed
from batchrun.limits.gates import AnyGate
from batchrun.limits.probe_turns import InDoubt
from batchrun.policy import Judgement
from batchrun.records import OK, Answer, Attempt, Request, Verdict
from batchrun.response import answer as answers
from batchrun.response.finish_reasons import is_known


class Workers:
    """Sends every row of the backlog: call `work_all`, and `endings.on_commit` after each commit.

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
        store = open_run.store
        self._checkpoint = store.checkpoint
        self._attempt_prefix = store.plan.manifest.attempt_prefix
        self._slots = open_run.slots
        self._clock = asyncio.get_running_loop().time
        self._image_memory = ImageMemory()
        self._capped = bool(job.budget.caps_usd) or job.budget.max_tokens is not None
        self.gate = gate
        self.learned = learned
        self.backlog = Backlog(
            store.open_next, requests.pending, self._clock, open_run.has_room, lambda: gate.successes
        )
        self._last_rows = LastRows(self.backlog, gate, job.retry, answered_before=store.was_answered)
        self.serving = Serving(job, store.plan.manifest.dialect, self._clock)
        self.endings = Endings(job, open_run, gate, self.backlog, self._last_rows, self.serving)
        self.anomalies, self.retries = self.endings.anomalies, self.endings.retries
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
        now.unpriced_usage[:] = before.unpriced_usage
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
        turns = self.gate.turns
        while True:
            probes = await turns.wait() if turns.circuit.in_doubt else False
            if (pending := await self._next(probes=probes)) is None:
                turns.end()
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
                turns.end()
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
            pending = None if probes else self.backlog.next_at_once()
            if pending is None:
                pending = await self.backlog.next(probes=probes)
        except BatchrunError as error:  # disk or input: admission ends, requests in flight may end
            self.fail(error)
            return None
        if pending is None and self.backlog.left_to_wait and self.endings.long_wait is not None:
            self.gate.close(self.endings.long_wait)
        if pending is not None and pending.successes is None:
            self._last_rows.untried += 1
        return pending

    def _put_back(self, pending: Pending) -> None:
        """The row was not sent and is pending again."""
        if pending.successes is None:
            self._last_rows.untried -= 1
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
            self.gate.release(slot, 0)
            self.fail(error)
            self._unpark(key)
            return
        if self.gate.stop is None:
            await self._attempt(with_key(pending, request.key), request, slot, key)
        else:  # the gate closed while this row waited for memory
            self.gate.release(slot, 0)
            self._unpark(key)
        self._image_memory.release(request)

    async def _attempt(self, pending: Pending, request: Request, slot: int, key: Key) -> None:
        """Sends the row's request once and puts the attempt's record on the checkpoint's queue.

        `request` has its images, if it has any; that of `pending` lacks them.
        """
        gate, serving, row, n = self.gate, self.serving, request.row, pending.history.attempts + 1
        tier, body = None, request.body
        if not serving.is_plain:
            tier = serving.tier(pending)
            body = serving.body(body, tier, key)
        self.endings.record_if_held(row)
        bound, tokens = gate.bound(slot)
        successes = gate.successes
        # before the first byte is sent, so that a crash leaves no request unnamed
        self._slots.occupy(slot, request.row, n, request.key, bound, tokens)
        self.sent += 1
        to = self.endpoints.of(slot)
        version = to.credentials.version
        attempt = await to.transport.send(body, f"{self._attempt_prefix}-{row}-{n}")
        answer = answers.parse(attempt.body, request.choices)

        judgement = self._judge(pending, attempt, answer, tier, slot)
        if judgement.verdict is Verdict.PAUSE and self.endpoints.was_key_replaced(slot, version):
            judgement = policy.with_replaced_key(judgement)
        settlement = None
        if judgement is policy.ANSWERED:  # shows the gate, the backlog and the last rows that the endpoint is well
            decision = gate.observe(slot, Outcome(row, OK))
            history = attempt_caps.answered(pending.history)
            self._last_rows.ended(history, judgement)
            self.backlog.ended(pending, OK)
            settlement = row_status.settlement(answer, request.expected, self._job.finish, attempt.http_status)
        else:
            decision, history = self._observe_failure(pending, slot, successes, attempt, judgement)

        reported_cost = reported(attempt, answer)
        table = self._requests.prices.get(request.model)
        cost = cost_of(attempt, answer, judgement, table, reported_cost)
        if cost is None and table is not None and prices.lacks_tier(table, answer.service_tier):
            add_once(self.anomalies.unpriced_tiers, answer.service_tier or "")
        if answer.billed_apart is not None and (table is None or not table.every_tier):
            add_once(self.anomalies.unpriced_usage, answer.billed_apart)
        in_doubt = not cost and maybe_billed(answer, judgement, cost, capped=self._capped)
        result = AttemptResult(
            pending, attempt, answer, judgement, settlement, history, bound, cost, in_doubt, reported_cost, tokens
        )

        if not serving.shares_no_prefix:
            self._unpark(key, answered=judgement is policy.ANSWERED)
        if not serving.is_plain and (stop := serving.stop_for(judgement)) is not None:
            self.close(stop)
        self.endings.end(result, decision, slot, successes)

    def _judge(self, pending: Pending, attempt: Attempt, answer: Answer, tier: str | None, slot: int) -> Judgement:
        """The verdict on the attempt. What it used teaches estimates, overruns and rates."""
        gate, anomalies, learned, request = self.gate, self.anomalies, self.learned, pending.request
        if pending.successes is None:
            self._last_rows.untried -= 1
        self.slow_s = forecast.peak(self.slow_s, attempt.latency_s)
        if answer.finish_reason not in ("stop", None) and not is_known(answer.finish_reason):
            add_once(anomalies.unknown_finish_reasons, answer.finish_reason)
        tier_may_be_full = tier is not None and tier not in prices.ORDINARY
        judgement = policy.judge(attempt, answer, self._job.retry, tier_may_be_full=tier_may_be_full)
        if judgement is not policy.ANSWERED or anomalies.quota_refused_since_s is not None:
            judgement = anomalies.escalate_quota(judgement, self._clock())
        if (usage := answer.usage) is not None:
            learned.estimates.learn(request, usage)
            if learned.overruns.learn(request, usage):
                self._checkpoint.put_entry(overruns.ENTRY, learned.overruns.encode())
            gate.settle(slot, usage.total_tokens, usage.completion_tokens)
        if judgement.error is not None and judgement.is_capacity:
            gate.settle(slot, 0)  # nothing was used, and a full tier's headers tell nothing of our limits
        else:
            gate.read_headers(slot, attempt.headers)
        return judgement

    def _observe_failure(
        self, pending: Pending, slot: int, successes: int, attempt: Attempt, judgement: Judgement
    ) -> tuple[Decision, History]:
        """What the gate decides about the run, and the row's history with this attempt. `successes` is the gate's count
        of good answers as it was sent.
        """
        row = pending.request.row
        self.refused += judgement.verdict is Verdict.SLOW
        reached = attempt.error is None or attempt.error.sent
        is_last = reached and self._last_rows.may_be_at_fault
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
        # a full tier is an answer as far as the backlog is concerned: the endpoint is well
        self.backlog.ended(pending, Verdict.ROW if judgement.is_capacity else judgement.verdict)
        return decision, history
