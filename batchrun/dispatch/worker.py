"""The life of one attempt, and the workers that walk through it, in five steps:

    admitted by the gate → named in its slot → sent → judged → settled, or retried

A fixed set of workers pulls rows; there is no task, future or timeout object per row. Each attempt, retries too, pays
the gate again. A slot is taken before the bytes leave and returned when the commit of the attempt's end is durable.
"""

import asyncio
import functools
import random
from collections.abc import Sequence
from decimal import Decimal

import msgspec

from batchrun import attempt_caps, policy, prices
from batchrun.dispatch.attempt_result import NOTHING, Ended, cost_of, maybe_billed, reported, together
from batchrun.dispatch.backlog import Backlog, Invalid, Pending
from batchrun.dispatch.image_memory import ImageMemory
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.requests import Requests, identified
from batchrun.dispatch.retries import Retries
from batchrun.dispatch.signs import Signs
from batchrun.dispatch.store import Landing
from batchrun.dispatch.tail import Tail
from batchrun.errors import BatchrunError, ExitCode, InputError
from batchrun.job.job import Job
from batchrun.limits import forecast, overruns
from batchrun.limits.admission import Outcome, Ruling, Stop
from batchrun.limits.gate import Gate, GateClosed
from batchrun.limits.probe_turns import InDoubt
from batchrun.policy import Settlement
from batchrun.records import Attempt, Completion, Correction, Ending, Request, Status, Verdict
from batchrun.request.builder import corrected
from batchrun.response import answer as answers
from batchrun.transport.transport import Transport


class _Flight(msgspec.Struct, frozen=True):
    """What happens when an end is durable: the slot and money that return, and the row's next turn, if it has one."""

    ended: Ended
    slot: int | None
    again: Pending | None = None
    due_s: float = 0.0


class Workers:
    """Sends every row of the backlog. `work_all` is the whole of it; `durable` is called after each commit.

    `failure` is why the run can't go on, once it can't.
    """

    def __init__(
        self, job: Job, requests: Requests, gate: Gate, transport: Transport, landing: Landing, learned: LearnedLimits
    ) -> None:
        """Call it within the event loop."""
        self._job = job
        self._requests = requests
        self._transport = transport
        self._landing = landing
        self._store = store = landing.store
        self._checkpoint = store.checkpoint
        self._slots = landing.slots
        self._clock = asyncio.get_running_loop().time
        self._image_memory = ImageMemory()
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._held: dict[int, Ended] = {}
        self._long_wait: Stop | None = None  # of the last row that was asked to wait longer than the job allows
        self._capped = job.budget.max_cost_usd is not None or job.budget.max_tokens is not None
        self.gate = gate
        self.learned = learned
        self.backlog = Backlog(
            store.chunks.open_next, requests.pending, self._clock, landing.has_room, lambda: gate.successes
        )
        self._tail = Tail(self.backlog, gate, job.retry, answered_before=store.was_answered)
        self.signs = Signs(
            quota_patience_s=job.retry.max_wait_s,
            resumed=store.plan.resumed,
            retried=store.checkpoint.has_reopened,
        )
        self.retries = Retries(self._clock)
        self.failure: BaseException | None = None
        self._working: asyncio.Task[None] | None = None
        self.sent = 0
        self.slow_s = 0.0  # the latency that nearly all answers keep

    async def work_all(self) -> None:
        """Every pending row is settled, or the gate has closed, or `cancel` was called; `failure` may say why."""
        self._working = asyncio.create_task(self._work_together())
        await asyncio.wait([self._working])
        if not self._working.cancelled() and (error := self._working.exception()) is not None:
            self.fail(_first(error))

    async def _work_together(self) -> None:
        """An exception of one worker, a bug, ends the others."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(self.gate.slots):
                tasks.create_task(self.work(), name=f"worker-{number}")

    def cancel(self) -> None:
        """What is in flight is given up: the slots keep the names."""
        if self._working is not None:
            self._working.cancel()

    async def work(self) -> None:
        """Sends rows until none is left or the gate closes."""
        while True:
            probes = await self.gate.turns.take()
            if (pending := await self._next(probes=probes)) is None:
                self.gate.turns.end()
                return
            request = pending.request
            try:
                slot = await self.gate.admit(self._requests.ask(request), probes=probes)
            except GateClosed:
                self.backlog.close()
                return
            except InDoubt:
                self._put_back(pending)
                continue
            if probes:
                self.gate.turns.end()
            if request.pictures:
                await self._attempt_with_pictures(pending, slot)
            else:
                await self._attempt(pending, request, slot)

    def close(self, stop: Stop) -> None:
        """Nothing more is sent; what is in flight may land."""
        self.gate.close(stop)
        self.backlog.close()

    def fail(self, error: BaseException) -> None:
        """The run can't go on: nothing more is sent, and `failure` says why."""
        if self.failure is None:
            self.failure = error
        self.close(Stop(error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL_ERROR, str(error)))
        if self._checkpoint.broken:
            self.cancel()  # answers that can't be kept are not waited for: the slots keep their names

    async def _next(self, *, probes: bool) -> Pending | None:
        """The next row to send. A disk or input that fails here ends admission, but who is in flight may still land."""
        try:
            pending = await self.backlog.next(probes=probes)
        except BatchrunError as error:
            self.fail(error)
            return None
        if pending is None and self.backlog.left_to_wait and self._long_wait is not None:
            self.gate.close(self._long_wait)
        if pending is not None and pending.successes is None:
            self._tail.handed_out()
        return pending

    def _put_back(self, pending: Pending) -> None:
        """The row was not sent."""
        if pending.successes is None:
            self._tail.tried()
        self.backlog.put_back(pending)

    async def _attempt_with_pictures(self, pending: Pending, slot: int) -> None:
        """The same with the images in the body, which nothing holds any more when this returns."""
        try:
            request = await self._image_memory.load(functools.partial(self._requests.with_pictures, pending))
        except InputError as error:
            self.gate.release(slot, NOTHING)
            self.fail(error)
            return
        if self.gate.stop is None:
            await self._attempt(identified(pending, request.key), request, slot)
        else:  # it closed while this row waited for room
            self.gate.release(slot, NOTHING)
        self._image_memory.leave(request)

    async def _attempt(self, pending: Pending, request: Request, slot: int) -> None:
        """The attempt, from its slot to the checkpoint."""
        n = pending.history.attempts + 1
        if (held := self._held.pop(request.row, None)) is not None:
            self._checkpoint.put(held.discarded())
        bound = self.gate.bound(slot)
        self._slots.take(slot, request.row, n, request.key, *bound)
        successes = self.gate.successes
        self.sent += 1
        attempt = await self._transport.send(request.body, self._store.attempt_id(request.row, n))
        if pending.successes is None:
            self._tail.tried()
        ended, ruling = self._judged(pending, attempt, slot, bound, successes)
        self.backlog.ended(pending, ended.judgement.verdict)
        for row in ruling.own:
            self._end_held(row)
        if ruling.hold and not self._refused_before(ended):
            self._hold(ended, slot)
        elif ended.settlement is not None:
            self._take(ended, ended.settlement, slot)
        elif ended.judgement.verdict is Verdict.ROW or ruling.hold or self._tail.gives_up(ended.history):
            self._settle(ended, slot)
        else:
            self._ask_again(ended, slot, successes)

    def _judged(
        self, pending: Pending, attempt: Attempt, slot: int, bound: tuple[Decimal | None, int], successes: int
    ) -> tuple[Ended, Ruling]:
        """How the attempt ended, what it cost, and what the gate makes of it."""
        request, row = pending.request, pending.request.row
        self.slow_s = forecast.peak(self.slow_s, attempt.latency_s)
        answer = answers.read(attempt.body, request.choices)
        self.signs.answered(answer.finish_reason)
        judgement = self.signs.judged(policy.judge(attempt, answer, self._job.retry), self._clock())
        if answer.usage is not None:
            self.learned.estimates.learn(request, answer.usage)
            if self.learned.overruns.learn(request, answer.usage):
                self._checkpoint.note(overruns.ENTRY, self.learned.overruns.encode())
            self.gate.settle(slot, answer.usage.total_tokens, answer.usage.completion_tokens)
        self.gate.hear(slot, attempt.headers)
        settlement: Settlement | None = None
        if judgement.verdict is Verdict.OK:
            ruling = self.gate.observe(slot, Outcome(row, Verdict.OK))
            history = attempt_caps.answered(pending.history)
            settlement = policy.settlement(answer, request.expected, self._job.finish, attempt.http_status)
            self._tail.answered(healed=pending.history.attempts > 0)
        else:
            reached = attempt.error is None or attempt.error.sent
            chargeable, is_last = judgement.is_chargeable, reached and self._tail.is_reached
            at_tail = chargeable and is_last
            refused_again = is_last and judgement.is_refusal and pending.history.refused_alone > 0
            doubted = judgement.is_retried and self.backlog.is_doubted(row)
            says_nothing = at_tail or refused_again or doubted
            outcome = Outcome(row, judgement.verdict, judgement.error, judgement.retry_after_s, says_nothing)
            ruling = self.gate.observe(slot, outcome)
            before = successes if pending.successes is None else pending.successes
            witnessed = reached and self.gate.successes > before
            history = attempt_caps.after(pending.history, judgement, corroborated=witnessed, at_tail=at_tail)
            history = attempt_caps.refused(history, judgement, corroborated=witnessed, at_tail=is_last)
        self._tail.ended(history, judgement)
        reported_usd = reported(attempt, answer)
        table = self._requests.price(request.model)
        cost_usd = cost_of(attempt, answer, judgement, table, reported_usd)
        if cost_usd is None and table is not None and prices.lacks_tier(table, answer.service_tier):
            self.signs.unpriced(answer.service_tier)
        doubtful = maybe_billed(answer, judgement, cost_usd, capped=self._capped)
        bound_usd, bound_tokens = bound
        facts = pending, attempt, answer, judgement, settlement, history
        return Ended(*facts, bound_usd, cost_usd, doubtful, reported_usd, bound_tokens), ruling

    def durable(self, endings: Sequence[Ending]) -> None:
        """The endings are on disk: their slots are free, and what waited for them goes on. One call a commit."""
        for ending in endings:
            n = ending.attempts if isinstance(ending, Completion) else ending.n
            flight = self._flights.pop((ending.row, n), None)
            if flight is None:
                continue  # a held attempt's record: its slot was given back when it was held
            if flight.slot is not None:
                self._slots.clear(flight.slot)
                self.gate.release(flight.slot, *flight.ended.spent())
            if flight.again is not None:
                self.backlog.retry(flight.again, flight.due_s)
                continue
            self._landing.settled(ending, flight.ended.pending.chunk)
            self.backlog.done()

    def record_held(self) -> None:
        """The attempts of rows that are still held are on their way to the disk; the rows stay pending."""
        for ended in self._held.values():
            self._checkpoint.put(ended.discarded())
        self._held.clear()

    def _take(self, ended: Ended, settlement: Settlement, slot: int) -> None:
        """The answer settles its row, unless the job wants another in its place."""
        pending = ended.pending
        history = attempt_caps.asked_again(ended.history, settlement, self._job.retry)
        if history is not None and settlement.correctable and settlement.error is not None:
            new = Correction(ended.said, settlement.error.message or "")
            if any(new.answer == each.answer for each in pending.corrections):
                history = None  # a model that says the same again will say it a third time
            corrections = (*pending.corrections, new)
            invalid = Invalid(ended.attempt, settlement.error, ended.answer.usage, ended.cost_usd)
            request = corrected(pending.request, [new])
            pending = msgspec.structs.replace(pending, request=request, corrections=corrections, invalid=invalid)
        if history is None:
            self._finish(ended, slot, settlement.status)
        else:
            again = msgspec.structs.replace(ended, pending=pending, history=history)
            self._ask_again(again, slot, self.gate.successes)

    def _settle(self, ended: Ended, slot: int | None) -> None:
        """The row's completion, without an answer, is on its way to the disk."""
        self._finish(ended, slot, Status.FILTERED if ended.judgement.filtered else Status.ERROR)

    def _end_held(self, row: int) -> None:
        """A verdict on the run that turned out to be this row's own: it failed, but after a 429 it has another turn."""
        ended = self._held.pop(row, None)
        if ended is None:
            return
        self.backlog.release(row)
        if ended.attempt.http_status == 429:
            if ended.judgement.verdict is Verdict.PAUSE:
                error = ended.judgement.error
                self._long_wait = Stop(ExitCode.PAUSED, f"row {row}: {'429' if error is None else error.text}")
            self._ask_again(ended, None, self.gate.successes)
        else:
            self._finish(ended, None, Status.ERROR)

    def _refused_before(self, ended: Ended) -> bool:
        """True for the last row of a run when an earlier start was refused the same: with nobody left to bear witness,
        a 403 that outlives a restart is the row's own, or every start would pause for it. So is a 429 that asks for a
        long wait, and did so `retry.max_wait_s` ago.
        """
        return ended.pending.refused and ended.attempt.http_status in (403, 429) and self.backlog.alone

    def _finish(self, ended: Ended, slot: int | None, status: Status) -> None:
        """The row's completion is on its way to the disk."""
        self.retries.drop(ended.pending.request.row)
        completion = ended.completion(status, self._checkpoint.invocation)
        self._flights[completion.row, completion.attempts] = _Flight(ended, slot)
        self._checkpoint.put(completion)
        if (stop := self.signs.settled(completion.status, completion.error)) is not None:
            self.gate.close(stop)

    def _ask_again(self, ended: Ended, slot: int | None, successes: int) -> None:
        """The attempt's record is on its way to the disk; once it is there, the row waits for its next turn."""
        history, judgement = ended.history, ended.judgement
        again = msgspec.structs.replace(
            ended.pending,
            history=history,
            cost_usd=together(ended.pending.cost_usd, ended.cost_usd),
            successes=successes,
            waits_long=judgement.verdict is Verdict.PAUSE,
        )
        due_s = now_s = self._clock()
        if judgement.verdict is Verdict.OK:
            self.retries.drop(ended.pending.request.row)
        else:
            due_s += attempt_caps.backoff_s(history, judgement.retry_after_s, self._job.retry, random.random())
            if again.waits_long:
                due_s = max(due_s, now_s + (judgement.retry_after_s or 0.0))
            if self._tail.is_reached:
                wait_s = attempt_caps.tail_wait_s(history, judgement, self._job.retry, self.backlog.waiting)
                due_s = max(due_s, now_s + wait_s)
            self.retries.put(ended.pending.request.row, history.attempts, judgement.error, due_s)
        discarded = ended.discarded()
        if (set_aside := discarded.set_aside) is not None:
            again = msgspec.structs.replace(again, set_aside=(*again.set_aside, set_aside))
        flight = _Flight(ended, slot, again, due_s)
        self._flights[ended.pending.request.row, history.attempts] = flight
        self._checkpoint.put(discarded)

    def _hold(self, ended: Ended, slot: int) -> None:
        """The refusal is kept in memory until its meaning is clear. It cost nothing, so its slot is free at once."""
        row = ended.pending.request.row
        self._held[row] = ended
        self._slots.clear(slot)
        self.gate.release(slot, NOTHING, 0)
        self.backlog.hold(msgspec.structs.replace(ended.pending, history=ended.history))


def _first(error: BaseException) -> BaseException:
    """The first exception inside a group: the others are its consequences."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
