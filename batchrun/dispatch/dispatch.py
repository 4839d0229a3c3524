"""Sends every pending row: makes the gate, the transport, the workers and the heartbeat, and runs them to their end."""

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
from batchrun.dispatch.store import OpenRun, Store
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
    """Sends every pending row: call `send_all` once."""

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
        """Returns None when every pending row is settled and every full chunk sealed, else why the run stopped.

        Raises:
            BatchrunError: the run had to end; what was received is durable as far as the disk accepted it.
        """
        job, store, loop = self._job, self._store, asyncio.get_running_loop()
        learned = LearnedLimits(store.checkpoint, job.limits, loop.time(), store.plan.facts.variant)
        max_in_flight, spare = self._connections()
        gate = self._open_gate(loop, learned, max_in_flight)
        wire = wires.choose(job.endpoint)
        self._status.log.write("transport", wire=wire.wire, why=wire.why)
        with (
            contextlib.closing(InFlightFile(store.directory.inflight, max_in_flight)) as slots,
            contextlib.closing(ImageDigests(store.directory.images_of(store.plan.facts.layout))) as checked,
        ):
            requests = Requests(job, store.plan, checked, learned.estimates)
            results = None if self._hooks.host is None else self._hooks.host.results
            open_run = OpenRun(store, slots, results, asyncio.Queue())
            async with wires.opened(wire, job.url, job.endpoint, self._credentials, tails=spare) as transport:
                workers = Workers(job, requests, gate, transport, open_run, learned)
                self._status.reached(Running(store.checkpoint, store.plan, workers, self._deadline))
                heartbeat = Heartbeat(store.directory, self._status, workers, transport, self._deadline, self._hooks)
                shutdown = await self._work(workers, heartbeat, open_run)
                await asyncio.to_thread(learned.save, gate)
        if workers.failure is not None:
            raise workers.failure
        paused = gate.stop is not None and gate.stop.exit_code is ExitCode.PAUSED
        if (heartbeat.deadline_came or paused) and not store.pending:
            return None  # the last rows were in flight then, so the run is complete
        return shutdown.final_stop(gate.stop)

    async def _work(self, workers: Workers, heartbeat: Heartbeat, open_run: OpenRun) -> "Shutdown":
        """The workers have ended, and what they received is durable and sealed."""
        loop = asyncio.get_running_loop()
        open_run.store.checkpoint.listen(_in_loop(loop, workers.on_commit), _in_loop(loop, workers.fail))
        shutdown = Shutdown(workers, self._hooks, self._status)
        heartbeat.warn_of_limits(self._job.limits)
        heartbeat.check_deadline()
        beat = asyncio.create_task(heartbeat.beat())
        beat.add_done_callback(functools.partial(_on_last_beat, workers))
        sealing = asyncio.create_task(self._seal(workers, open_run))
        shutdown.listen(self._hooks.host, open_run.store.chunks.rows_of)
        await workers.work_all()
        shutdown.abandoned = await self._flush(workers, open_run)
        heartbeat.report_changes()
        open_run.full.put_nowait(None)
        await sealing
        beat.cancel()
        return shutdown

    async def _flush(self, workers: Workers, open_run: OpenRun) -> int:
        """Everything received is durable, and requests still in flight are listed as possibly billed; their number."""
        await workers.backlog.stop()
        workers.record_held()
        checkpoint, facts = self._store.checkpoint, self._store.plan.facts
        if not await asyncio.to_thread(checkpoint.flushed):
            return 0  # the disk failed: the slots keep the names for the next start
        await asyncio.sleep(0)  # lets the last commit's `on_commit` run
        run = facts.attempt_prefix if self._job.endpoint.id_header else None
        lost = in_flight.possibly_billed(open_run.slots.taken(), checkpoint.invocation, "aborted", run)
        await asyncio.to_thread(checkpoint.name_possibly_billed, lost)
        open_run.slots.clear_all()
        return len(lost)

    async def _seal(self, workers: Workers, open_run: OpenRun) -> None:
        """Writes full chunks as parts, one at a time in a thread, until a None comes from the queue."""
        while (chunk := await open_run.full.get()) is not None:
            try:
                await asyncio.to_thread(self._store.chunks.seal, chunk)
            except BaseException as error:
                workers.fail(error)
                return
            self._status.log.write("sealed", chunk=chunk.chunk.chunk, rows=chunk.chunk.rows)

    def _connections(self) -> tuple[int, int]:
        """How many requests may be in flight, and how many connections are spare for streams that have ended."""
        wanted, files = self._job.limits.max_in_flight, OpenFiles()
        room = files.connections(wanted + MAX_TAILS)
        if room < wanted:
            self._hooks.note(files.shortage(wanted, room))
        return min(wanted, room), max(0, room - wanted)

    def _open_gate(self, loop: asyncio.AbstractEventLoop, learned: LearnedLimits, max_in_flight: int) -> Gate:
        limits, known, log = self._job.limits, learned.known, self._status.log
        burst = int((limits.requests_per_minute or 0.0) / 60 * BURST_S)  # a rate set by the job needs no slow start
        circuit = Circuit(
            in_flight=InFlight(max_in_flight, max(burst, known.in_flight or 0)),
            max_outage_s=self._job.retry.max_outage_s,
            resumed=self._store.plan.resumed,
            uniform=random.random,
            on_change=functools.partial(_log_phase, log),
        )
        return Gate(
            circuit,
            loop,
            limits,
            daily=learned.daily,
            found=Found(known.requests_per_minute, known.tokens_per_minute),
            purse=_budget_account(self._job.budget, self._store.checkpoint.spent),
            overruns=learned.overruns,
            on_pace=functools.partial(_log_pace, log),
            on_kind=functools.partial(_log_kind, log),
        )


class Shutdown:
    """Ends the run early, on a signal or for the host program.

    `abandoned` is how many requests were still in flight at the end.
    """

    def __init__(self, workers: Workers, hooks: Hooks, status: RunStatus) -> None:
        self._workers = workers
        self._hooks = hooks
        self._status = status
        self._by: str | None = None
        self.abandoned = 0

    def listen(self, host: Host | None, rows_of: RowsOf) -> None:
        """From now on signals and the host can end the run, and the host receives settled rows."""
        loop = asyncio.get_running_loop()
        if host is not None:
            host.results.listen(_in_loop(loop, self._workers.backlog.wake), rows_of)
            host.stop.listen(_in_loop(loop, functools.partial(self.request, signals.PROGRAM, ExitCode.STOPPED)))
        for number, exit_code in signals.EXIT_CODES.items() if signals.ours() else ():
            loop.add_signal_handler(number, self.request, number.name, exit_code)

    def request(self, by: str, exit_code: ExitCode) -> None:
        """The first call ends admission and lets requests in flight end within the grace; the second ends them now."""
        if self._by is not None:
            self._workers.cancel()
            return
        self._by = by
        in_flight, grace_s = self._workers.gate.in_flight, self._hooks.grace_s
        self._status.log.write("signal", name=by, in_flight=in_flight)
        drain = f"waiting up to {grace_s:g} s for {plural(in_flight, 'request')} in flight"
        self._hooks.note(f"{by}: {drain}; send it again to stop now")
        self._workers.close(Stop(exit_code, f"{by}: drained"))
        asyncio.get_running_loop().call_later(grace_s, self._workers.cancel)

    def final_stop(self, stop: Stop | None) -> Stop | None:
        """The stop, with the number of abandoned requests, which is known only at the end."""
        if stop is None or self._by is None or not self.abandoned:
            return stop
        abandoned = plural(self.abandoned, "request")
        return msgspec.structs.replace(stop, why=f"{self._by}: stopped at once; {abandoned} in flight abandoned")


def _budget_account(budget: Budget, totals: Totals) -> BudgetAccount | None:
    """The budget's caps, less what the run has spent so far; None without a budget."""
    if budget == Budget():
        return None
    cost, tokens, requests = budget.max_cost_usd, budget.max_tokens, budget.max_requests
    return BudgetAccount(
        cost_usd=None if cost is None else Cap(cost, totals.most_usd()),
        tokens=None if tokens is None else Cap(tokens, totals.tokens()),
        requests=None if requests is None else Cap(requests, totals.requests()),
    )


def _on_last_beat(workers: Workers, beat: "asyncio.Task[None]") -> None:
    """A heartbeat that ends by an exception, such as a bug in `progress`, ends the run: it enforces the deadlines."""
    if not beat.cancelled() and (error := beat.exception()) is not None:
        workers.fail(error)


def _log_phase(log: RunLog, before: Phase, after: Phase) -> None:
    log.write("gate", before=type(before).__name__, after=type(after).__name__, why=getattr(after, "why", None))


def _log_pace(log: RunLog, limit: Limit, before: float | None, after: float | None, why: str) -> None:
    log.write("pace", limit=limit, before=before, after=after, why=why)


def _log_kind(log: RunLog, kind: str, why: str) -> None:
    log.write("refusals", kind=kind, why=why)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[*Ts], None]) -> Callable[[*Ts], None]:
    """A function for any thread that runs `call` in the loop's thread; it does nothing once the loop is closed."""

    def call_in_loop(*arguments: *Ts) -> None:
        with contextlib.suppress(RuntimeError):  # raised by a closed loop: a disk may fail after the last row
            loop.call_soon_threadsafe(call, *arguments)

    return call_in_loop
