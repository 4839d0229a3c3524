"""Sends every pending row: makes the gate, the transport, the workers and the heartbeat, and runs them to their end."""

import asyncio
import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TypeVarTuple

from batchrun import signals
from batchrun.credentials import Credentials
from batchrun.dispatch.endpoints import Connected, Endpoints, OpenTransports
from batchrun.dispatch.gate_log import GateLog
from batchrun.dispatch.heartbeat import Heartbeat
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.requests import Requests
from batchrun.dispatch.run_status import Running, RunStatus
from batchrun.dispatch.shared_budget import SharedBudget, name_of
from batchrun.dispatch.shutdown import Shutdown
from batchrun.dispatch.store import OpenRun, Store
from batchrun.dispatch.worker import Workers
from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.job.settings import Limits
from batchrun.limits.admission import Found, Stop
from batchrun.limits.budget import BudgetAccount, Cap
from batchrun.limits.circuit import Circuit
from batchrun.limits.deadline import Deadline
from batchrun.limits.gate import Gate
from batchrun.limits.gates import AnyGate, Circuits, Gates, Lane
from batchrun.limits.in_flight import InFlight
from batchrun.limits.rates import RateLimits
from batchrun.limits.shared_admission import SharedAdmission
from batchrun.limits.token_bucket import BURST_S
from batchrun.money import to_pico
from batchrun.open_files import OpenFiles
from batchrun.records import Ending, Notice
from batchrun.request.image_digests import ImageDigests
from batchrun.store import in_flight
from batchrun.store.in_flight import InFlightFile
from batchrun.transport.connector import MAX_TAILS
from batchrun.transport.transport import Opened, Wanted, opened_here

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

    async def send_all(self, open_transports: OpenTransports | None = None) -> Stop | None:
        """Returns None when every pending row is settled and every full chunk sealed, else why the run stopped.
        Without `open_transports`, this process sends.

        Raises:
            BatchrunError: the run had to end; what was received is durable as far as the disk accepted it.
        """
        over_time = await asyncio.to_thread(SharedBudget.open, self._job, self._store.directory.path)
        try:
            return await self._send_all(over_time, open_transports or opened_here)
        finally:
            if over_time is not None:
                await over_time.close()

    async def _send_all(self, over_time: SharedBudget | None, open_transports: OpenTransports) -> Stop | None:
        job, store, loop = self._job, self._store, asyncio.get_running_loop()
        learned = LearnedLimits(store.checkpoint, job.limits, loop.time(), store.plan.manifest.variant)
        in_flight_each, spare = self._connections()
        gate = self._open_gate(loop, learned, in_flight_each, over_time)
        with_ids = job.endpoint.id_header is not None
        with (
            contextlib.closing(InFlightFile(store.directory.inflight, gate.slots, with_ids=with_ids)) as slots,
            contextlib.closing(ImageDigests(store.directory.images_of(store.plan.manifest.layout))) as checked,
        ):
            requests = Requests(job, store.plan, checked, learned.estimates)
            results = None if self._hooks.host is None else self._hooks.host.results
            open_run = OpenRun(store, slots, results, asyncio.Queue())
            async with contextlib.AsyncExitStack() as opened:
                wanted = Wanted(job.endpoints, self._credentials, sum(in_flight_each), spare, self._status.log.write)
                connected = self._connected(await opened.enter_async_context(open_transports(wanted)))
                endpoints = Endpoints(connected, gate, self._status.log, self._hooks.note)
                workers = Workers(job, requests, gate, endpoints, open_run, learned)
                if over_time is not None:
                    over_time.listen(gate.shared.wake, workers.fail)
                self._status.reached(Running(store.checkpoint, store.plan, workers, self._deadline))
                heartbeat = Heartbeat(store.directory, self._status, workers, self._deadline, self._hooks)
                shutdown = await self._work(workers, heartbeat, open_run)
                await asyncio.to_thread(learned.save, gate)
        if workers.failure is not None:
            raise workers.failure
        paused = gate.stop is not None and gate.stop.exit_code is ExitCode.PAUSED
        if (heartbeat.deadline_came or paused) and not store.pending:
            return None  # the last rows were in flight then, so the run is complete
        return shutdown.final_stop(gate.stop)

    async def _work(self, workers: Workers, heartbeat: Heartbeat, open_run: OpenRun) -> Shutdown:
        """The workers have ended, and what they received is durable and sealed. Signals and the host can end it."""
        loop = asyncio.get_running_loop()

        def on_commit(endings: Sequence[Ending]) -> None:
            workers.endings.on_commit(endings)
            if self._hooks.otel is not None:
                self._hooks.otel.settled(endings)

        open_run.store.checkpoint.listen(_in_loop(loop, on_commit), _in_loop(loop, workers.fail), loop.call_soon)
        shutdown = Shutdown(workers, self._hooks, self._status.log)
        heartbeat.warn_of_limits(self._job.total_limits)
        heartbeat.check_deadline()
        beat = asyncio.create_task(heartbeat.beat())
        beat.add_done_callback(functools.partial(_on_last_beat, workers))
        sealing = asyncio.create_task(self._seal(workers, open_run))
        if (host := self._hooks.host) is not None:
            completions_of = open_run.store.chunks.completions_of
            host.results.listen(_in_loop(loop, workers.backlog.wake), completions_of, loop.call_soon)
            host.stop.listen(_in_loop(loop, functools.partial(shutdown.request, signals.PROGRAM, ExitCode.STOPPED)))
        for number, exit_code in signals.EXIT_CODES.items() if signals.may_handle() else ():
            loop.add_signal_handler(number, shutdown.request, number.name, exit_code)
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
        workers.endings.record_held()
        checkpoint, manifest = self._store.checkpoint, self._store.plan.manifest
        if not await asyncio.to_thread(checkpoint.flushed):
            return 0  # the disk failed: the slots keep the names for the next start
        await asyncio.sleep(0)  # lets the last commit's `on_commit` run
        occupied = open_run.slots.occupied()
        lost = in_flight.possibly_billed(occupied, checkpoint.invocation, "aborted", manifest.attempt_prefix)
        await asyncio.to_thread(checkpoint.add_possibly_billed, lost)
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
            if self._hooks.otel is not None:
                self._hooks.otel.chunk_sealed(chunk.chunk.chunk)

    def _connections(self) -> tuple[list[int], int]:
        """How many requests may be in flight at each endpoint, and how many connections of each are spare for streams
        that have ended.
        """
        job, files = self._job, OpenFiles()
        each = [job.limits.max_in_flight]
        if job.more_endpoints:
            each = [job.limits_of(endpoint).max_in_flight for endpoint in job.endpoints]
        wanted = sum(each)
        room = files.connections(wanted + MAX_TAILS)
        if room < wanted:
            self._hooks.note(Notice(files.shortage(wanted, room), "open files", wanted=wanted, possible=room))
            each = [max(1, one * room // wanted) for one in each]
        return each, max(0, room - wanted) // len(each)

    def _connected(self, opened: Sequence[Opened]) -> list[Connected]:
        """The endpoints with the transports that were opened to them."""
        connected = []
        for label, (transport, choice), credentials in zip(
            self._job.labels, opened, self._credentials.members, strict=True
        ):
            named = {"endpoint": label} if self._job.more_endpoints else {}
            self._status.log.write("transport", wire=choice.wire, why=choice.why, **named)
            connected.append(Connected(label, transport, credentials))
        return connected

    def _open_gate(
        self,
        loop: asyncio.AbstractEventLoop,
        learned: LearnedLimits,
        in_flight: list[int],
        over_time: SharedBudget | None,
    ) -> AnyGate:
        """One gate for one endpoint; for several one each, with the budget and the queue in common."""
        job, known, now_s = self._job, learned.known, loop.time()
        budget = _budget_account(job, self._store, over_time)
        if not job.more_endpoints:
            log = GateLog(self._status.log)
            circuit = self._circuit(job.limits, in_flight[0], known.in_flight or 0, log)
            rates = RateLimits(
                job.limits,
                now_s,
                daily=learned.daily,
                found=Found(known.requests_per_minute, known.tokens_per_minute),
                on_rate_change=log.rate_changed,
            )
            shared = SharedAdmission(loop, circuit, budget)
            return Gate(circuit, shared, rates, overruns=learned.overruns, on_cause=log.refusals_explained)
        lanes = list[Lane]()
        shared = SharedAdmission(loop, Circuits(lanes), budget)
        for label, endpoint, most in zip(job.labels, job.endpoints, in_flight, strict=True):
            limits, log = job.limits_of(endpoint), GateLog(self._status.log, label)
            circuit = self._circuit(limits, most, 0, log)
            rates = RateLimits(limits, now_s, on_rate_change=log.rate_changed)
            gate = Gate(circuit, shared, rates, overruns=learned.overruns, on_cause=log.refusals_explained)
            lanes.append(Lane(label, gate, endpoint.weight))
        return Gates(shared, lanes, self._on_set_aside)

    def _circuit(self, limits: Limits, most: int, known: int, log: GateLog) -> Circuit:
        """`most` and `known`: how many requests may be in flight, and how many an earlier start had in flight."""
        burst = int((limits.requests_per_minute or 0.0) / 60 * BURST_S)  # a rate set by the job needs no slow start
        return Circuit(
            in_flight=InFlight(most, max(burst, known)),
            max_outage_s=self._job.retry.max_outage_s,
            resumed=self._store.plan.resumed,
            uniform=random.random,
            on_change=log.phase_changed,
        )

    def _on_set_aside(self, label: str, stop: Stop) -> None:
        self._status.log.write("endpoint set aside", endpoint=label, why=stop.why)
        line = f"warning: endpoint {label} is set aside: {self._credentials.clean_text(stop.why)}"
        self._hooks.note(Notice(line, "endpoint set aside", endpoint=label))


def _budget_account(job: Job, store: Store, over_time: SharedBudget | None) -> BudgetAccount:
    """The budget's caps, less what the run has spent so far."""
    budget, totals = job.budget, store.checkpoint.totals
    cost, tokens, requests = budget.max_cost_usd, budget.max_tokens, budget.max_requests
    per_start = budget.per_start_usd
    return BudgetAccount(
        cost=None if cost is None else _cap_on_cost(cost, totals.most_usd()),
        tokens=None if tokens is None else Cap(tokens, totals.tokens()),
        requests=None if requests is None else Cap(requests, totals.requests()),
        start=None if per_start is None else _cap_on_cost(per_start, totals.most_usd() - store.before_usd),
        over_time=over_time,
        name=name_of(job),
    )


def _cap_on_cost(most_usd: Decimal, spent_usd: Decimal) -> Cap:
    return Cap(to_pico(most_usd, ROUND_FLOOR), to_pico(spent_usd, ROUND_CEILING))


def _on_last_beat(workers: Workers, beat: "asyncio.Task[None]") -> None:
    """A heartbeat that ends by an exception, such as a bug in `progress`, ends the run: it enforces the deadlines."""
    if not beat.cancelled() and (error := beat.exception()) is not None:
        workers.fail(error)


def _in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[*Ts], None]) -> Callable[[*Ts], None]:
    """A function for any thread that runs `call` in the loop's thread; it does nothing once the loop is closed."""

    def call_in_loop(*arguments: *Ts) -> None:
        with contextlib.suppress(RuntimeError):  # raised by a closed loop: a disk may fail after the last row
            loop.call_soon_threadsafe(call, *arguments)

    return call_in_loop
