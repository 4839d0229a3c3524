"""The path of one attempt, and the workers that walk it: backlog → gate → transport → answer → policy → checkpoint.

A fixed set of workers pulls rows; there is no task, future or timeout object per row. Each attempt, retries too, pays
the gate again. A slot is taken before the bytes leave and given back when the commit of the attempt's end is durable.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from decimal import Decimal

import msgspec

from batchrun import policy, prices
from batchrun.answer import answer as answers
from batchrun.asking.backlog import Backlog, Invalid, Pending
from batchrun.asking.delivery import Delivery
from batchrun.asking.ended import NOTHING, Ended, cost_of, maybe_billed, remembered, reported, total
from batchrun.asking.image_room import ImageRoom
from batchrun.asking.retries import Retries
from batchrun.asking.signs import Signs
from batchrun.checkpoint import variants
from batchrun.checkpoint.checkpoint import Checkpoint
from batchrun.checkpoint.slots import Slots
from batchrun.checkpoint.tables import usd
from batchrun.errors import BatchrunError, InputError
from batchrun.gate import forecast
from batchrun.gate import overruns as overrunning
from batchrun.gate.admission import Ask, Outcome
from batchrun.gate.gate import Gate, GateClosed
from batchrun.gate.learned import Estimates
from batchrun.gate.overruns import Overruns
from batchrun.job.job import Job
from batchrun.output.chunks import OpenChunk
from batchrun.plan.plan import Plan
from batchrun.policy import History, Settlement
from batchrun.records import (
    Completion,
    Correction,
    Ending,
    Request,
    Row,
    Status,
    Verdict,
)
from batchrun.request.builder import RequestBuilder, corrected
from batchrun.request.image_digests import ImageDigests
from batchrun.request.images import Images
from batchrun.transport.transport import Transport


class _Flight(msgspec.Struct, frozen=True):
    """What happens when an ending is durable: `again` None settles the row, else it is asked again at `due_s`."""

    slot: int | None
    spent_usd: Decimal | None
    spent_tokens: int | None
    chunk: OpenChunk
    again: Pending | None = None
    due_s: float = 0.0


class Pipeline:
    """Asks every row of the backlog. `work` is what each worker runs; `durable` is called back after each commit."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        *,
        gate: Gate,
        estimates: Estimates,
        overruns: Overruns,
        transport: Transport,
        checkpoint: Checkpoint,
        slots: Slots,
        checked: ImageDigests,
        open_next: Callable[[], OpenChunk | None],
        on_settled: Callable[[OpenChunk], None],
        on_failure: Callable[[BatchrunError], None],
        clock: Callable[[], float],
        uniform: Callable[[], float],
        delivery: Delivery | None = None,
    ) -> None:
        """`checked` says what images were. `on_settled` gets each chunk whose last row is durable, `on_failure` why
        there are no more rows to be had; `clock` is the event loop's. `delivery` takes settled rows to who reads them.
        """
        self._job = job
        self._plan = plan
        self._gate = gate
        self._transport = transport
        self._checkpoint = checkpoint
        self._slots = slots
        self._checked = checked
        self._images = Images(job.input)
        self._room = ImageRoom()
        self._on_settled = on_settled
        self._on_failure = on_failure
        self._clock = clock
        self._uniform = uniform
        self._builders = [RequestBuilder(variants.as_job(job, way), plan.facts.dialect) for way in plan.variants]
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._held: dict[int, Ended] = {}
        self._delivery = delivery
        room = {} if delivery is None else {"room": delivery.room}
        self.backlog = Backlog(open_next, self._prepare, clock, **room, successes=lambda: gate.successes)
        budget = job.budget
        self._capped = budget.max_cost_usd is not None or budget.max_tokens is not None
        self._failing = 0.0  # the share of first attempts that fail
        self.signs = Signs(quota_patience_s=job.retry.max_wait_s, resumed=plan.resumed)
        self._untried = 0  # rows that are out, or wait at the gate, for the first time in this process
        self._healed = 0  # rows that were answered after they had failed
        self._answered_before = any(
            rows for status, rows in checkpoint.spent.standing.items() if status != Status.ERROR
        )
        self.retries = Retries(clock)
        self.estimates = estimates
        self._overruns = overruns
        self.sent = 0
        self.slow_s = 0.0  # the latency that nearly all answers keep
        self._name = plan.facts.attempt_prefix

    async def work_all(self, workers: int) -> None:
        """Every pending row is settled, or the gate has closed; an exception of one worker ends the others."""
        async with asyncio.TaskGroup() as tasks:
            for number in range(workers):
                tasks.create_task(self.work(), name=f"worker-{number}")

    async def work(self) -> None:
        """Asks rows until none is left or the gate closes."""
        while (pending := await self._next()) is not None:
            self._untried += pending.successes is None
            try:
                slot = await self._gate.admit(self._ask(pending.request))
            except GateClosed:
                self.backlog.close()
                return
            if pending.request.pictures:
                await self._attempt_with_pictures(pending, slot)
            else:
                await self._attempt(pending, pending.request, slot)

    async def _next(self) -> Pending | None:
        """The next row to ask. A disk or input that fails here ends admission, but who is in flight may still land."""
        try:
            return await self.backlog.next()
        except BatchrunError as error:
            self._on_failure(error)
            return None

    async def _attempt_with_pictures(self, pending: Pending, slot: int) -> None:
        """The same with the images in the body, which nothing holds any more when this returns."""
        try:
            request = await self._room.load(functools.partial(self._with_pictures, pending))
        except InputError as error:
            self._gate.release(slot, NOTHING)
            self._on_failure(error)
            return
        if self._gate.stop is None:
            await self._attempt(_identified(pending, request.key), request, slot)
        else:  # it closed while this row waited for room
            self._gate.release(slot, NOTHING)
        self._room.leave(request)

    def _with_pictures(self, pending: Pending) -> Request:
        """The request with its images, as they are now. For a thread: it reads files.

        Raises:
            InputError: they can't be had, or are not what was checked.
        """
        row = pending.request.row
        try:
            read = pending.chunk.window.row(row)
            request, digest = self._builders[pending.variant].whole(read, self._images.read)
            known = self._checked.of(row) if pending.variant == self._plan.facts.variant else None
            if known not in (None, digest):
                raise InputError("its images are not those that were checked")
        except InputError as error:
            ways_on = "put them back, or take the images as they are with --accept-changes"
            raise InputError(f"row {row}: {error}: changed while the run works; {ways_on}") from error
        return corrected(request, pending.corrections)

    async def _attempt(self, pending: Pending, request: Request, slot: int) -> None:
        n = pending.history.attempts + 1
        if (held := self._held.pop(request.row, None)) is not None:
            self._checkpoint.put(held.discarded())
        successes = self._gate.successes
        bound_usd, bound_tokens = self._gate.bound(slot)
        self._slots.take(slot, request.row, n, request.key, bound_usd, bound_tokens)
        self.sent += 1
        attempt = await self._transport.send(request.body, f"{self._name}-{request.row}-{n}")
        self._untried -= pending.successes is None
        self.slow_s = forecast.peak(self.slow_s, attempt.latency_s)
        answer = answers.read(attempt.body)
        judgement = self.signs.judged(policy.judge(attempt, answer, self._job.retry), self._clock())
        if answer.usage is not None:
            self.estimates.learn(pending.request, answer.usage)
            if self._overruns.learn(pending.request, answer.usage):
                self._checkpoint.note(overrunning.ENTRY, self._overruns.encode())
            self._gate.settle(slot, answer.usage.total_tokens, answer.usage.completion_tokens)
        self._gate.hear(slot, attempt.headers)
        reached = attempt.error is None or attempt.error.sent
        at_tail = reached and self.at_tail and policy.is_chargeable(judgement)
        outcome = Outcome(request.row, judgement.verdict, judgement.error, judgement.retry_after_s, at_tail)
        ruling = self._gate.observe(slot, outcome)
        witnessed = self._gate.successes > (successes if pending.successes is None else pending.successes)
        history = policy.after(pending.history, judgement, corroborated=reached and witnessed, at_tail=at_tail)
        self._failing = policy.failing_share(self._failing, history, judgement)
        settlement = None
        if judgement.verdict is Verdict.OK:
            self._healed += pending.history.attempts > 0
            self.retries.drop(request.row)
            settlement = policy.settlement(answer, request.expected, self._job.finish, attempt.http_status)
            self.signs.answered(answer.finish_reason)
        told_usd = reported(attempt, answer)
        cost_usd = cost_of(attempt, answer, judgement, self._plan.prices.get(request.model), told_usd)
        doubtful = maybe_billed(answer, judgement, cost_usd, capped=self._capped)
        facts = pending, attempt, answer, judgement, settlement, history
        ended = Ended(*facts, bound_usd, cost_usd, doubtful, told_usd, bound_tokens)
        for row in ruling.own:
            self._end_held(row)
        if ruling.hold and not self._refused_before(ended):
            self._hold(ended, slot)
        elif settlement is not None:
            self._take(ended, settlement, slot)
        elif judgement.verdict is Verdict.ROW or ruling.hold or self._given_up(history):
            self._settle(ended, slot)
        else:
            self._ask_again(ended, slot, successes)

    @property
    def at_tail(self) -> bool:
        """True when no row is left but such as have failed in this process, in a run whose endpoint has answered: no
        other row can show then whether the endpoint is well. The only row of a run has none beside it from the start.
        """
        answered = self._answered_before or self._gate.successes > 0 or self.backlog.alone
        return answered and not self._untried and self.backlog.drained

    def _given_up(self, history: History) -> bool:
        """Whether the row has used up its attempts. At the tail the rows that are left may be the reason themselves why
        so many fail: rows that were answered in the end show there how many fail by chance.
        """
        share = self._failing
        if self.at_tail:
            share = min(share, self._healed / max(1, self._gate.successes))
        return policy.exhausted(history, self._job.retry, policy.stretch(share))

    def durable(self, endings: Sequence[Ending]) -> None:
        """The endings are on disk: their slots are free, and what waited for them goes on. One call a commit."""
        for ending in endings:
            n = ending.attempts if isinstance(ending, Completion) else ending.n
            flight = self._flights.pop((ending.row, n), None)
            if flight is None:
                continue  # a held attempt's record: its slot was given back when it was held
            if flight.slot is not None:
                self._slots.clear(flight.slot)
                self._gate.release(flight.slot, flight.spent_usd, flight.spent_tokens)
            if flight.again is not None:
                self.backlog.retry(flight.again, flight.due_s)
                continue
            if self._delivery is not None and isinstance(ending, Completion):
                self._delivery.put(ending, flight.chunk)
            self.backlog.done()
            flight.chunk.left -= 1
            if not flight.chunk.left:
                self._on_settled(flight.chunk)

    def record_held(self) -> None:
        """The attempts of rows that are still held are on their way to the disk; the rows stay pending."""
        for ended in self._held.values():
            self._checkpoint.put(ended.discarded())
        self._held.clear()

    def _prepare(self, row: Row, chunk: OpenChunk) -> Pending:
        """The row's request, with what earlier invocations did for it."""
        reopened = chunk.reopened.get(row.row)
        variant = self._plan.facts.variant if reopened is None else reopened.variant
        try:
            request = self._builders[variant].build(row)
        except InputError as error:  # the check pass built this very request: only a changed input gets here
            raise InputError(f"row {row.row}: {error}") from error
        before = 0 if reopened is None else reopened.attempts
        cost_usd = NOTHING if reopened is None else usd(reopened.cost_usd)
        earlier = [attempt for attempt in chunk.discarded.get(row.row, ()) if attempt.n > before]
        begun = max(before, chunk.lost.get(row.row, 0))
        refused = any(attempt.verdict is Verdict.PAUSE and attempt.http_status == 403 for attempt in earlier)
        cost_usd = total([cost_usd, *(attempt.cost_usd for attempt in earlier)])
        return Pending(request, chunk, remembered(earlier, begun), cost_usd, refused=refused, variant=variant)

    def _take(self, ended: Ended, settlement: Settlement, slot: int) -> None:
        """The answer settles its row, unless the job wants another in its place."""
        pending = ended.pending
        history = policy.asked_again(ended.history, settlement, self._job.retry)
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
            self._ask_again(again, slot, self._gate.successes)

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
            self._ask_again(ended, None, self._gate.successes)
        else:
            self._finish(ended, None, Status.ERROR)

    def _refused_before(self, ended: Ended) -> bool:
        """True for the last row of a run when an earlier start was refused the same: with nobody left to bear witness,
        a 403 that outlives a restart is the row's own, or every start would pause for it.
        """
        return ended.pending.refused and ended.attempt.http_status == 403 and self.backlog.alone

    def _finish(self, ended: Ended, slot: int | None, status: Status) -> None:
        """The row's completion is on its way to the disk."""
        self.retries.drop(ended.pending.request.row)
        completion = ended.completion(status, self._checkpoint.invocation)
        self._flights[completion.row, completion.attempts] = _Flight(slot, *ended.spent(), ended.pending.chunk)
        self._checkpoint.put(completion)
        if (stop := self.signs.settled(completion.status, completion.error)) is not None:
            self._gate.close(stop)

    def _ask_again(self, ended: Ended, slot: int | None, successes: int) -> None:
        """The attempt's record is on its way to the disk; once it is there, the row waits for its next turn."""
        history, judgement = ended.history, ended.judgement
        again = msgspec.structs.replace(
            ended.pending,
            history=history,
            cost_usd=total([ended.pending.cost_usd, ended.cost_usd]),
            successes=successes,
        )
        due_s = self._clock()
        if judgement.verdict is not Verdict.OK:
            due_s += policy.backoff_s(history, judgement.retry_after_s, self._job.retry, self._uniform())
            if self.at_tail:
                due_s = max(due_s, self._clock() + policy.tail_wait_s(history, judgement, self._job.retry))
        if judgement.verdict is not Verdict.OK:
            self.retries.put(ended.pending.request.row, history.attempts, judgement.error, due_s)
        flight = _Flight(slot, *ended.spent(), ended.pending.chunk, again, due_s)
        self._flights[ended.pending.request.row, history.attempts] = flight
        self._checkpoint.put(ended.discarded())

    def _hold(self, ended: Ended, slot: int) -> None:
        """The refusal is kept in memory until its meaning is clear. It cost nothing, so its slot is free at once."""
        row = ended.pending.request.row
        self._held[row] = ended
        self._slots.clear(slot)
        self._gate.release(slot, NOTHING, 0)
        self.backlog.hold(msgspec.structs.replace(ended.pending, history=ended.history))

    def _ask(self, request: Request) -> Ask:
        """What one attempt at the request takes and may take."""
        prompt, output = self.estimates.of(request)
        table = self._plan.prices.get(request.model)
        tier = prices.asked_tier(table, request.body)
        bound_usd = prices.upper_bound(request.max_prompt_tokens, request.max_output_tokens, table, tier)
        per_million = (NOTHING, NOTHING) if table is None else prices.dearest(table, tier)
        return Ask(prompt + output, bound_usd, request.upper_bound_tokens, output, request.model, *per_million)


def _identified(pending: Pending, key: bytes) -> Pending:
    """The row with its key, and still without its images: it may have to wait again."""
    return msgspec.structs.replace(pending, request=msgspec.structs.replace(pending.request, key=key))
