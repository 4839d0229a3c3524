"""The event loop's share of a run: every pending row is sent, full chunks are sealed, a heart beats, signals are heard.

What this start needs is made in the order in which it is needed, each part of those before it:

    learned limits → gate → slots → transport → workers → heartbeat
"""

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable
from typing import TypeVarTuple

import msgspec

from batchrun import signals
from batchrun.credentials import Credentials
from batchrun.dispatch.heartbeat import Heartbeat
from batchrun.dispatch.hooks import Hooks, Host
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.requests import Requests
from batchrun.dispatch.result_queue import RowsOf
from batchrun.dispatch.run_status import Running, RunStatus
from batchrun.dispatch.runlog import RunLog
from batchrun.dispatch.store import Landing, Store
from batchrun.dispatch.worker import Workers
from batchrun.errors import ExitCode
from batchrun.job.job import Budget, Job
from batchrun.limits.admission import Found, Limit, Phase, Stop
from batchrun.limits.budget import BudgetAccount, Cap
from batchrun.limits.circuit import Circuit
from batchrun.limits.deadline import Deadline
from batchrun.limits.gate import Gate
from batchrun.limits.in_flight import InFlight
from batchrun.limits.token_bucket import BURST_S
from batchrun.open_files import OpenFiles
from batchrun.report.wording import plural
from batchrun.request.image_digests import ImageDigests
from batchrun.store import in_flight
from batchrun.store.in_flight import InFlightFile
from batchrun.store.totals import Totals
from batchrun.transport import transport as wires
from batchrun.transport.connector import MAX_TAILS

Ts = TypeVarTuple("Ts")


class Dispatch:
    """Sends every pending row, once. `send_all` is the whole of it."""

    def __init__(
        self,
        job: Job,
        store: Store,
        credentials: Credentials,
        status: RunStatus,
        hooks: Hooks,
        deadline: Deadline | None = None,
    ) -> None:
        self._job = job
        self._store = store
        self._credentials = credentials
        self._status = status
        self._hooks = hooks
        self._deadline = deadline

    async def send_all(self) -> Stop | None:
        """Every pending row is settled and every full chunk sealed; or why not.

        Raises:
            BatchrunError: the run can't go on; what was received is durable as far as the disk took it.
        """
        job, store, loop = self._job, self._store, asyncio.get_running_loop()
        learned = LearnedLimits(store.checkpoint, job.limits, loop.time(), store.plan.facts.variant)
        at_once, tails = self._connections()
        gate = self._open_gate(loop, learned, at_once)
        wire = wires.choose(job.endpoint)
        self._status.log.write("transport", wire=wire.wire, why=wire.why)
        with (
            contextlib.closing(InFlightFile(store.directory.inflight, at_once)) as in_flight,
            contextlib.closing(ImageDigests(store.directory.images_of(store.plan.facts.layout))) as checked,
        ):
            requests = Requests(job, store.plan, checked, learned.estimates)
            results = None if self._hooks.host is None else self._hooks.host.results
            landing = Landing(store, in_flight, results, asyncio.Queue())
            async with wires.opened(wire, job.url, job.endpoint, self._credentials, tails=tails) as transport:
                workers = Workers(job, requests, gate, transport, landing, learned)
                self._status.reached(Running(store.checkpoint, store.plan, workers, self._deadline))
                heart = Heartbeat(store.directory, self._status, workers, transport, self._deadline, self._hooks)
                leaving = await self._work(workers, heart, landing)
                await asyncio.to_thread(learned.keep, gate)
        if workers.failure is not None:
            raise workers.failure
        paused = gate.stop is not None and gate.stop.exit_code is ExitCode.PAUSED
        if (heart.deadline_came or paused) and not store.pending:
            return None  # what was in flight then were the last rows: there is nothing to come back for
        return leaving.as_it_ended(gate.stop)

    async def _work(self, workers: Workers, heart: Heartbeat, landing: Landing) -> "Leaving":
        """The workers have ended, and what they received is durable and sealed."""
        loop = asyncio.get_running_loop()
        landing.store.checkpoint.listen(_in_loop(loop, workers.durable), _in_loop(loop, workers.fail))
        leaving = Leaving(workers, self._hooks, self._status)
        heart.warn_of_limits(self._job.limits)
        heart.keep_deadline()
        beat = asyncio.create_task(heart.beat())
        beat.add_done_callback(functools.partial(_on_last_beat, workers))
        sealing = asyncio.create_task(self._seal(workers, landing))
        leaving.listen(self._hooks.host, landing.store.chunks.rows_of)
        await workers.work_all()
        leaving.given_up = await self._land(workers, landing)
        heart.report_changes()
        landing.full.put_nowait(None)
        await sealing
        beat.cancel()
        return leaving

    async def _land(self, workers: Workers, landing: Landing) -> int:
        """What was received is durable, and who is still in flight is named; how many those are."""
        await workers.backlog.stop()
        workers.record_held()
        checkpoint, facts = self._store.checkpoint, self._store.plan.facts
        if not await asyncio.to_thread(checkpoint.flushed):
            return 0  # the disk failed: the slots keep the names for the next start
        await asyncio.sleep(0)  # the last commit has called into this loop
        run = facts.attempt_prefix if self._job.endpoint.id_header else None
        lost = in_flight.possibly_billed(landing.slots.taken(), checkpoint.invocation, "aborted", run)
        await asyncio.to_thread(checkpoint.name_possibly_billed, lost)
        landing.slots.clear_all()
        return len(lost)

    async def _seal(self, workers: Workers, landing: Landing) -> None:
        """Full chunks become parts, one at a time, off the event loop, until a None comes."""
        while (chunk := await landing.full.get()) is not None:
            try:
                await asyncio.to_thread(self._store.chunks.seal, chunk)
            except BaseException as error:
                workers.fail(error)
                return
            self._status.log.write("sealed", chunk=chunk.chunk.chunk, rows=chunk.chunk.rows)

    def _connections(self) -> tuple[int, int]:
        """How many requests may be in flight at once, and how many ended streams may keep their connection open."""
        wanted, files = self._job.limits.max_in_flight, OpenFiles()
        room = files.connections(wanted + MAX_TAILS)
        if room < wanted:
            self._hooks.note(files.shortage(wanted, room))
        return min(wanted, room), max(0, room - wanted)

    def _open_gate(self, loop: asyncio.AbstractEventLoop, learned: LearnedLimits, at_once: int) -> Gate:
        limits, known, log = self._job.limits, learned.known, self._status.log
        burst = int((limits.requests_per_minute or 0.0) / 60 * BURST_S)  # a told pace needs no slow start
        state = Circuit(
            in_flight=InFlight(at_once, max(burst, known.in_flight or 0)),
            max_outage_s=self._job.retry.max_outage_s,
            resumed=self._store.plan.resumed,
            uniform=random.random,
            on_change=functools.partial(_log_phase, log),
        )
        return Gate(
            state,
            loop,
            limits,
            daily=learned.daily,
            found=Found(known.requests_per_minute, known.tokens_per_minute),
            purse=_purse(self._job.budget, self._store.checkpoint.spent),
            overruns=learned.overruns,
            on_pace=functools.partial(_log_pace, log),
            on_kind=functools.partial(_log_kind, log),
        )


class Leaving:
    """How the run is left before its rows have ended: by a signal, or by the program that hosts it.

    `given_up` is how many requests in flight were not waited for.
    """

    def __init__(self, workers: Workers, hooks: Hooks, status: RunStatus) -> None:
        self._workers = workers
        self._hooks = hooks
        self._status = status
        self._by: str | None = None
        self.given_up = 0

    def listen(self, host: Host | None, rows_of: RowsOf) -> None:
        """Signals are heard from now on, and the host, who is handed what is settled."""
        loop = asyncio.get_running_loop()
        if host is not None:
            host.results.listen(_in_loop(loop, self._workers.backlog.wake), rows_of)
            host.stop.listen(_in_loop(loop, functools.partial(self.leave, signals.PROGRAM, ExitCode.STOPPED)))
        for number, exit_code in signals.EXIT_CODES.items() if signals.ours() else ():
            loop.add_signal_handler(number, self.leave, number.name, exit_code)

    def leave(self, by: str, exit_code: ExitCode) -> None:
        """First: no more admission, requests in flight may end within the grace. Second: now."""
        if self._by is not None:
            self._workers.cancel()
            return
        self._by = by
        in_flight, grace_s = self._workers.gate.in_flight, self._hooks.grace_s
        self._status.log.write("signal", name=by, in_flight=in_flight)
        flying = f"{plural(in_flight, 'request')} in flight may end within {grace_s:g} s"
        self._hooks.note(f"{by}: {flying}; once more to stop now")
        self._workers.close(Stop(exit_code, f"{by}: drained"))
        asyncio.get_running_loop().call_later(grace_s, self._workers.cancel)

    def as_it_ended(self, stop: Stop | None) -> Stop | None:
        """The reason of the end, which after a signal was not known until the last request in flight had ended."""
        if stop is None or self._by is None or not self.given_up:
            return stop
        given_up = plural(self.given_up, "request")
        return msgspec.structs.replace(stop, why=f"{self._by}: stopped at once; {given_up} in flight given up")


def _purse(budget: Budget, spent: Totals) -> BudgetAccount | None:
    """The budget's caps over what the run has spent so far; None where it has none."""
    if budget == Budget():
        return None
    cost, tokens, requests = budget.max_cost_usd, budget.max_tokens, budget.max_requests
    return BudgetAccount(
        cost_usd=None if cost is None else Cap(cost, spent.most_usd()),
        tokens=None if tokens is None else Cap(tokens, spent.tokens()),
        requests=None if requests is None else Cap(requests, spent.requests()),
    )


def _on_last_beat(workers: Workers, beat: "asyncio.Task[None]") -> None:
    """A heart that stopped by itself, by a bug in a `progress` say, ends the run: it keeps the deadlines."""
    if not beat.cancelled() and (error := beat.exception()) is not None:
        workers.fail(error)


def _log_phase(log: RunLog, before: Phase, after: Phase) -> None:
    log.write("gate", before=type(before).__name__, after=type(after).__name__, why=getattr(after, "why", None))


def _log_pace(log: RunLog, limit: Limit, before: float | None, after: float | None, why: str) -> None:
    log.write("pace", limit=limit, before=before, after=after, why=why)


def _log_kind(log: RunLog, kind: str, why: str) -> None:
    log.write("refusals", kind=kind, why=why)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[*Ts], None]) -> Callable[[*Ts], None]:
    """`call`, made in the loop's thread whichever thread calls; nothing once the loop has ended."""

    def called(*arguments: *Ts) -> None:
        with contextlib.suppress(RuntimeError):  # what a closed loop raises: a disk may fail after the last row
            loop.call_soon_threadsafe(call, *arguments)

    return called
