"""The event loop's share of a run: workers ask, full chunks are sealed, a heart beats, signals are heard."""

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable
from typing import TypeVarTuple

import msgspec

from batchrun import signals
from batchrun.asking.chronicle import Chronicle
from batchrun.asking.delivery import Delivery
from batchrun.asking.heartbeat import Heartbeat
from batchrun.asking.memory import Memory
from batchrun.asking.pipeline import Pipeline
from batchrun.checkpoint import slots
from batchrun.checkpoint.checkpoint import Checkpoint
from batchrun.checkpoint.spent import Spent
from batchrun.credentials import Credentials
from batchrun.errors import BatchrunError, ExitCode
from batchrun.gate import overruns
from batchrun.gate.accounts import BURST_S
from batchrun.gate.admission import Found, Limit, Phase, Stop
from batchrun.gate.deadline import Deadline
from batchrun.gate.gate import Gate
from batchrun.gate.in_flight import InFlight
from batchrun.gate.purse import Cap, Purse
from batchrun.gate.state import GateState
from batchrun.job.job import Budget, Job
from batchrun.open_files import OpenFiles
from batchrun.output.chunks import Chunks, OpenChunk
from batchrun.plan.plan import Plan
from batchrun.records import Summary
from batchrun.report.summary import plural, unknown_reason
from batchrun.request.image_digests import ImageDigests
from batchrun.rundir import RunDirectory
from batchrun.transport import transport as wires
from batchrun.transport.connector import MAX_TAILS
from batchrun.transport.transport import Transport

GRACE_S = 20.0
"""How long the first signal lets requests in flight end; Kubernetes kills after 30."""

Ts = TypeVarTuple("Ts")


class Host(msgspec.Struct, frozen=True):
    """A program that runs us in a thread beside its own: how it stops the run, and what it reads of it.

    `replay`: rows that earlier starts settled are handed over first.
    """

    stop: signals.StopRequest
    delivery: Delivery
    replay: bool


class Hooks(msgspec.Struct, frozen=True):
    """What the caller wants to hear: `progress` at the start and twice a second, `note` for single lines.

    `command` is the command line that resumes the run, but for its directory.
    """

    progress: Callable[[Summary], None] = lambda summary: None
    note: Callable[[str], None] = lambda line: None
    host: Host | None = None
    command: str | None = None


class Asking:
    """Asks every pending row, once. `ask` is the whole of it."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        directory: RunDirectory,
        credentials: Credentials,
        checkpoint: Checkpoint,
        chunks: Chunks,
        chronicle: Chronicle,
        hooks: Hooks,
        grace_s: float,
        deadline: Deadline | None = None,
    ) -> None:
        self._job = job
        self._plan = plan
        self._directory = directory
        self._credentials = credentials
        self._checkpoint = checkpoint
        self._chunks = chunks
        self._chronicle = chronicle
        self._hooks = hooks
        self._grace_s = grace_s
        self._deadline = deadline
        self._deadline_came = False
        self._purse = _purse(job.budget, checkpoint.spent)
        self._full: asyncio.Queue[OpenChunk | None] = asyncio.Queue()
        self._failure: BaseException | None = None
        self._leaving: str | None = None
        self._given_up = 0
        self._workers: asyncio.Task[None] | None = None
        self._told_in_flight = 0
        self._told_reasons = 0

    async def ask(self) -> Stop | None:
        """Every pending row is settled and every full chunk sealed; or why not.

        Raises:
            BatchrunError: the run can't go on; what was received is durable as far as the disk took it.
        """
        loop = asyncio.get_running_loop()
        self._memory = Memory(self._checkpoint, self._job.limits, loop.time(), self._plan.facts.variant)
        self._in_flight, tails = self._connections()
        self._gate = gate = self._open_gate(loop)
        flying = slots.Slots(self._directory.inflight, self._in_flight)
        checked = ImageDigests(self._directory.images_of(self._plan.facts.layout))
        wire = wires.choose(self._job.endpoint)
        self._chronicle.log.write("transport", wire=wire.wire, why=wire.why)
        async with wires.opened(wire, self._job.url, self._job.endpoint, self._credentials, tails=tails) as transport:
            self._pipeline = pipeline = self._open_pipeline(transport, flying, checked, loop)
            self._chronicle.gate, self._chronicle.pipeline = gate, pipeline
            self._checkpoint.listen(_in_loop(loop, pipeline.durable), _in_loop(loop, self._fail))
            heart = self._open_heart(transport, loop)
            heart.warn_of_limits(self._job.limits, self._memory.daily)
            heart.keep_deadline()
            beat = asyncio.create_task(heart.beat())
            beat.add_done_callback(self._on_last_beat)
            sealing = asyncio.create_task(self._seal())
            if self._hooks.host is not None:
                self._serve(self._hooks.host, loop)
            self._workers = asyncio.create_task(pipeline.work_all(self._in_flight))
            for number, exit_code in signals.EXIT_CODES.items() if signals.ours() else ():
                loop.add_signal_handler(number, self._on_signal, loop, number.name, exit_code)
            await self._drained(self._workers, flying)
            self._tell_reasons()
            self._tell_overruns()
            await asyncio.to_thread(self._memory.keep, gate)
            self._full.put_nowait(None)
            await sealing
            beat.cancel()
        flying.close()
        checked.close()
        if self._failure is not None:
            raise self._failure
        if self._deadline_came and self._checkpoint.spent.settled() == self._plan.rows:
            return None  # what was in flight at the deadline were the last rows
        return self._as_it_ended(gate.stop)

    def _as_it_ended(self, stop: Stop | None) -> Stop | None:
        """The reason of the end, which after a signal was not known until the last request in flight had ended."""
        if stop is None or self._leaving is None or not self._given_up:
            return stop
        given_up = plural(self._given_up, "request")
        return msgspec.structs.replace(stop, why=f"{self._leaving}: stopped at once; {given_up} in flight given up")

    async def _drained(self, workers: "asyncio.Task[None]", flying: slots.Slots) -> None:
        """The workers have ended, what they received is durable, and who is still in flight is named."""
        await asyncio.wait([workers])
        if not workers.cancelled() and (error := workers.exception()) is not None:
            self._fail(_first(error))
        await self._pipeline.backlog.stop()
        self._pipeline.record_held()
        if not await asyncio.to_thread(self._checkpoint.flushed):
            return  # the disk failed: the slots keep the names for the next start
        await asyncio.sleep(0)  # the last commit has called into this loop
        run = self._plan.facts.attempt_prefix if self._job.endpoint.id_header else None
        lost = slots.possibly_billed(flying.taken(), self._checkpoint.invocation, "aborted", run)
        await asyncio.to_thread(self._checkpoint.name_possibly_billed, lost)
        self._given_up = len(lost)
        flying.clear_all()

    async def _seal(self) -> None:
        """Full chunks become parts, one at a time, off the event loop."""
        while (chunk := await self._full.get()) is not None:
            try:
                await asyncio.to_thread(self._chunks.seal, chunk)
            except BaseException as error:
                self._fail(error)
                return
            self._chronicle.log.write("sealed", chunk=chunk.chunk.chunk, rows=chunk.chunk.rows)

    def _on_last_beat(self, beat: "asyncio.Task[None]") -> None:
        """A heart that stopped by itself, by a bug in a `progress` say, ends the run: it keeps the deadlines."""
        if not beat.cancelled() and (error := beat.exception()) is not None:
            self._fail(error)

    def _on_signal(self, loop: asyncio.AbstractEventLoop, name: str, exit_code: ExitCode) -> None:
        """First: no more admission, requests in flight may end within the grace. Second: now."""
        if self._leaving is not None:
            self._abort()
            return
        self._leaving = name
        flying = f"{plural(self._gate.in_flight, 'request')} in flight may end within {self._grace_s:g} s"
        self._chronicle.log.write("signal", name=name, in_flight=self._gate.in_flight)
        self._hooks.note(f"{name}: {flying}; once more to stop now")
        self._close(Stop(exit_code, f"{name}: drained"))
        loop.call_later(self._grace_s, self._abort)

    def _serve(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        """The host is handed what is settled, and heard when it wants to stop."""
        host.delivery.listen(_in_loop(loop, self._pipeline.backlog.wake), self._chunks.rows_of)
        stop = functools.partial(self._on_signal, loop, signals.PROGRAM, ExitCode.STOPPED)
        host.stop.listen(_in_loop(loop, stop))

    def _fail(self, error: BaseException) -> None:
        """The run can't go on: what is in flight may land, nothing new is sent, the error is raised at the end."""
        if self._failure is None:
            self._failure = error
        self._close(Stop(error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL_ERROR, str(error)))
        if self._checkpoint.broken:
            self._abort()  # answers that can't be kept are not waited for: the slots keep their names

    def _close(self, stop: Stop) -> None:
        self._gate.close(stop)
        self._pipeline.backlog.close()

    def _stop_by(self, loop: asyncio.AbstractEventLoop, stop: Stop, by_s: float) -> None:
        """The deadline: nothing more is sent; what is in flight may end by then, or within the grace after it."""
        self._deadline_came = True
        self._close(stop)
        loop.call_at(by_s + self._grace_s, self._abort)

    def _abort(self) -> None:
        if self._workers is not None:
            self._workers.cancel()

    def _connections(self) -> tuple[int, int]:
        """How many requests may be in flight at once, and how many ended streams may keep their connection open."""
        wanted, files = self._job.limits.max_in_flight, OpenFiles()
        room = files.connections(wanted + MAX_TAILS)
        if room < wanted:
            self._hooks.note(files.shortage(wanted, room))
        return min(wanted, room), max(0, room - wanted)

    def _open_gate(self, loop: asyncio.AbstractEventLoop) -> Gate:
        limits, known = self._job.limits, self._memory.known
        burst = int((limits.requests_per_minute or 0.0) / 60 * BURST_S)  # a told pace needs no slow start
        state = GateState(
            in_flight=InFlight(self._in_flight, max(burst, known.in_flight or 0)),
            max_outage_s=self._job.retry.max_outage_s,
            resumed=self._plan.resumed,
            uniform=random.random,
            on_change=self._on_phase,
        )
        return Gate(
            state,
            loop,
            limits,
            daily=self._memory.daily,
            found=Found(known.requests_per_minute, known.tokens_per_minute),
            purse=self._purse,
            overruns=self._memory.overruns,
            on_pace=self._on_pace,
            on_kind=self._on_kind,
        )

    def _open_pipeline(
        self, transport: Transport, flying: slots.Slots, checked: ImageDigests, loop: asyncio.AbstractEventLoop
    ) -> Pipeline:
        return Pipeline(
            self._job,
            self._plan,
            gate=self._gate,
            estimates=self._memory.estimates,
            overruns=self._memory.overruns,
            transport=transport,
            checkpoint=self._checkpoint,
            slots=flying,
            checked=checked,
            open_next=self._chunks.open_next,
            on_settled=self._full.put_nowait,
            on_failure=self._fail,
            clock=loop.time,
            uniform=random.random,
            delivery=None if self._hooks.host is None else self._hooks.host.delivery,
        )

    def _open_heart(self, transport: Transport, loop: asyncio.AbstractEventLoop) -> Heartbeat:
        return Heartbeat(
            self._directory,
            self._chronicle,
            self._gate,
            self._pipeline,
            transport,
            self._deadline,
            purse=self._purse,
            slots=self._in_flight,
            clock=loop.time,
            progress=self._hooks.progress,
            note=self._hooks.note,
            memory=self._memory,
            each=self._tell,
            fail=self._fail,
            stop_by=functools.partial(self._stop_by, loop),
        )

    def _on_phase(self, before: Phase, after: Phase) -> None:
        names = {"before": type(before).__name__, "after": type(after).__name__}
        self._chronicle.log.write("gate", **names, why=getattr(after, "why", None))

    def _on_pace(self, limit: Limit, before: float | None, after: float | None, why: str) -> None:
        self._chronicle.log.write("pace", limit=limit, before=before, after=after, why=why)

    def _on_kind(self, kind: str, why: str) -> None:
        self._chronicle.log.write("refusals", kind=kind, why=why)

    def _tell(self) -> None:
        """What has changed since the last beat is on record."""
        self._tell_in_flight()
        self._tell_reasons()
        self._tell_overruns()

    def _tell_overruns(self) -> None:
        """Each model whose answers are billed beyond their bounds is reported once in each start."""
        news = self._memory.overruns.to_tell
        while news:
            model, overrun = news.pop()
            self._chronicle.log.write("overrun", model=model, **msgspec.structs.asdict(overrun))
            self._hooks.note(f"warning: {overruns.in_words(model, overrun)}")

    def _tell_reasons(self) -> None:
        """Each finish_reason that batchrun does not know is reported once."""
        reasons = self._pipeline.signs.finish_reasons
        for reason in reasons[self._told_reasons :]:
            self._chronicle.log.write("unknown finish_reason", finish_reason=reason)
            self._hooks.note(f"warning: {unknown_reason(reason)}")
        self._told_reasons = len(reasons)

    def _tell_in_flight(self) -> None:
        """What was allowed in flight has changed since it was told last."""
        now, before = self._gate.allowed_in_flight, self._told_in_flight
        if now != before:
            self._told_in_flight = now
            self._chronicle.log.write("in flight", before=before, after=now, why=self._gate.why_in_flight)


def _purse(budget: Budget, spent: Spent) -> Purse | None:
    """The budget's caps over what the run has spent so far; None where it has none."""
    if budget == Budget():
        return None
    cost, tokens, requests = budget.max_cost_usd, budget.max_tokens, budget.max_requests
    return Purse(
        cost_usd=None if cost is None else Cap(cost, spent.most_usd()),
        tokens=None if tokens is None else Cap(tokens, spent.tokens()),
        requests=None if requests is None else Cap(requests, spent.requests()),
    )


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[*Ts], None]) -> Callable[[*Ts], None]:
    """`call`, made in the loop's thread whichever thread calls; nothing once the loop has ended."""

    def called(*arguments: *Ts) -> None:
        with contextlib.suppress(RuntimeError):  # what a closed loop raises: a disk may fail after the last row
            loop.call_soon_threadsafe(call, *arguments)

    return called


def _first(error: BaseException) -> BaseException:
    """The first exception inside a group: the others are its consequences."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
