"""One run from start to end: lock, plan, ask every row, seal the chunks, write the file. The picture of the whole.

    source ─→ request ─→ gate ─→ client ─→ policy ─→ checkpoint ─→ output ─→ report

`plan` reads and checks the source; `pipeline` walks request, gate, client, policy and checkpoint for each attempt; full
chunks become parts, and the parts the result. This module owns what surrounds them: the tasks, the signals, the
heartbeat, and the promise that every way out leaves a summary.json.
"""

import asyncio
import contextlib
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from types import FrameType
from typing import TypeVar

import msgspec

from batchrun import __version__, output, slots
from batchrun import plan as planning
from batchrun.accounts import Purse
from batchrun.admission import Phase, Stop
from batchrun.checkpoint import Checkpoint, read_finished
from batchrun.chunks import Chunks, OpenChunk
from batchrun.client import Client
from batchrun.credentials import Credentials
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, CheckpointError, DiskError, ExitCode, RunStoppedError
from batchrun.gate import Gate
from batchrun.gate_state import GateState
from batchrun.job import Job
from batchrun.pipeline import Pipeline, settle_all
from batchrun.plan import Asked, Plan
from batchrun.records import PossiblyBilled, Summary
from batchrun.request import wants_json
from batchrun.rundir import RunDirectory
from batchrun.runlog import RunLog
from batchrun.summary import Moment, failures, limiting_factor, starting, summarise

GRACE_S = 20.0
"""How long the first signal lets requests in flight end; Kubernetes kills after 30."""

SWEEP_S = 1.0
HEARTBEAT_S = 5.0
PROGRESS_S = 0.5
RESERVE_BYTES = 16_000_000
"""Given back when the disk is full: room for the answers that are in flight just then."""

SIGNALS = {
    signal.SIGINT: ExitCode.SIGINT,
    signal.SIGTERM: ExitCode.SIGTERM,
    signal.SIGHUP: ExitCode.SIGHUP,
}


T = TypeVar("T")


class Hooks(msgspec.Struct, frozen=True):
    """What the caller wants to hear: `progress` twice a second, `note` for single lines."""

    progress: Callable[[Summary], None] = lambda summary: None
    note: Callable[[str], None] = lambda line: None


def run(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    asked: Asked = Asked(),  # noqa: B008  (frozen)
    hooks: Hooks = Hooks(),  # noqa: B008  (frozen)
    *,
    grace_s: float = GRACE_S,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Summary:
    """The run is complete, or stopped as its summary says; the same call goes on with it. Blocks.

    Raises:
        BatchrunError: the run could not start or go on; what was received is on disk, and summary.json says why.
    """
    directory.create()
    with directory.lock():
        if (finished := _finished(job, directory, asked)) is not None:
            return finished
        invocation = _Invocation(job, directory, credentials, hooks, grace_s)
        try:
            return invocation.run(asked, loop_factory)
        except BatchrunError as error:
            invocation.end("failed", error.exit_code, str(error))
            raise
        except BaseException as error:
            invocation.end("failed", ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
            raise
        finally:
            invocation.close()


def _finished(job: Job, directory: RunDirectory, asked: Asked) -> Summary | None:
    """The summary of a run that is complete already, untouched; None where there is still something to do."""
    if not (directory.read_summary() or {}).get("complete"):
        return None
    try:
        summary = msgspec.json.decode(directory.summary.read_bytes(), type=Summary)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{directory.summary}: can't be read: {error}") from error
    facts = planning.facts_of(read_finished(directory.checkpoint))
    planning.require_same(job, facts)
    planning.require_same_input(planning.input_files(job, directory, asked), facts)
    return summary


class _Invocation:
    """This process's share of the run."""

    def __init__(
        self, job: Job, directory: RunDirectory, credentials: Credentials, hooks: Hooks, grace_s: float
    ) -> None:
        self._job = job
        self._directory = directory
        self._credentials = credentials
        self._hooks = hooks
        self._grace_s = grace_s
        self._started_at = datetime.now(UTC)
        self._started = time.monotonic()
        self._plan: Plan | None = None
        self._checkpoint: Checkpoint | None = None
        self._pipeline: Pipeline | None = None
        self._gate: Gate | None = None
        self._failure: BaseException | None = None
        self._workers: asyncio.Task[None] | None = None
        self._state = "checking"
        self._signals = 0
        self._log = RunLog(directory.log)
        self._write_summary(self._summary())

    def run(self, asked: Asked, loop_factory: Callable[[], asyncio.AbstractEventLoop] | None) -> Summary:
        """The plan, then the asking, then the result."""
        self._reserve()
        self._checkpoint = checkpoint = Checkpoint(self._directory.checkpoint, free_reserve=self._free_reserve)
        today = self._started_at.astimezone().date().isoformat()
        with _signals_raise():
            self._plan = plan = planning.make(self._job, self._directory, checkpoint, asked, today)
        number = checkpoint.begin_invocation(
            self._started_at.timestamp(), os.getpid(), socket.gethostname(), __version__
        )
        self._name_lost(checkpoint)
        self._log.write("started", invocation=number, resumed=plan.resumed, rows=plan.facts.rows)
        self._tell_start(plan, checkpoint)
        self._state = "running"
        chunks = self._chunks(plan, checkpoint)
        chunks.remove_orphans()
        if checkpoint.spent.settled() < plan.facts.rows:
            with asyncio.Runner(loop_factory=loop_factory) as runner:
                stop = runner.run(self._ask(plan, checkpoint, chunks))
            if stop is not None:
                return self.end("stopped", stop.exit_code, stop.why)
        with _signals_raise():
            if (unsettled := chunks.open_next()) is not None:
                raise CheckpointError(
                    f"chunk {unsettled.chunk.chunk}: rows are pending that the totals count as settled"
                )
            return self._finish(plan, checkpoint, chunks)

    async def _ask(self, plan: Plan, checkpoint: Checkpoint, chunks: Chunks) -> Stop | None:
        """Every pending row is settled and every full chunk sealed; or the reason why not."""
        loop = asyncio.get_running_loop()
        self._gate = gate = self._open_gate(plan, checkpoint, loop)
        flying = slots.Slots(self._directory.inflight, self._job.limits.max_in_flight)
        full: asyncio.Queue[OpenChunk | None] = asyncio.Queue()
        async with Client(self._job.url, self._job.endpoint, self._credentials) as client:
            self._pipeline = pipeline = Pipeline(
                self._job,
                plan,
                gate=gate,
                client=client,
                checkpoint=checkpoint,
                slots=flying,
                open_next=chunks.open_next,
                on_settled=full.put_nowait,
                clock=loop.time,
                uniform=random.random,
            )
            checkpoint.listen(
                lambda endings: _later(loop, pipeline.durable, endings), lambda error: _later(loop, self._fail, error)
            )
            beat = asyncio.create_task(self._beat(client))
            sealing = asyncio.create_task(self._seal(full, chunks))
            self._workers = asyncio.create_task(settle_all(pipeline, self._job.limits.max_in_flight))
            self._listen_to_signals(loop)
            try:
                await self._drained(self._workers, pipeline, checkpoint, flying)
            finally:
                full.put_nowait(None)
                await sealing
                beat.cancel()
        if self._failure is not None:
            raise self._failure
        return gate.stop

    async def _drained(
        self, workers: "asyncio.Task[None]", pipeline: Pipeline, checkpoint: Checkpoint, flying: slots.Slots
    ) -> None:
        """The workers have ended, what they received is durable, and who is still in flight is named."""
        await asyncio.wait([workers])
        if not workers.cancelled() and (error := workers.exception()) is not None:
            self._fail(_first(error))
        await pipeline.backlog.stop()
        pipeline.record_held()
        await asyncio.to_thread(checkpoint.flush)
        await asyncio.sleep(0)  # the last commit's call into this loop
        lost = flying.taken()
        await asyncio.to_thread(
            checkpoint.name_possibly_billed, _possibly_billed(lost, checkpoint.invocation, "aborted")
        )
        flying.close()

    async def _seal(self, full: "asyncio.Queue[OpenChunk | None]", chunks: Chunks) -> None:
        """Full chunks become parts, one at a time, off the event loop."""
        while (chunk := await full.get()) is not None:
            try:
                await asyncio.to_thread(chunks.seal, chunk)
            except BaseException as error:
                self._fail(error)
                return
            self._log.write("sealed", chunk=chunk.chunk.chunk, rows=chunk.chunk.rows)

    async def _beat(self, client: Client) -> None:
        """Progress twice a second, deadlines every second, summary.json every five."""
        loop = asyncio.get_running_loop()
        swept = written = loop.time()
        while True:
            await asyncio.sleep(PROGRESS_S)
            now = loop.time()
            summary = self._summary()
            self._hooks.progress(summary)
            if now - swept >= SWEEP_S:
                swept = now
                client.expire()
            if now - written >= HEARTBEAT_S:
                written = now
                await asyncio.to_thread(self._write_summary, summary)

    def _listen_to_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, exit_code in SIGNALS.items():
            loop.add_signal_handler(number, self._on_signal, loop, number.name, exit_code)

    def _on_signal(self, loop: asyncio.AbstractEventLoop, name: str, exit_code: ExitCode) -> None:
        """First: no more admission, requests in flight may end within the grace. Second: now."""
        assert self._gate is not None
        assert self._pipeline is not None
        self._signals += 1
        if self._signals > 1:
            self._abort()
            return
        self._log.write("signal", name=name, in_flight=self._gate.in_flight)
        flying = f"{self._gate.in_flight} requests in flight may end within {self._grace_s:g} s"
        self._hooks.note(f"{name}: {flying}; once more to stop now")
        self._gate.close(Stop(exit_code, f"{name}: drained"))
        self._pipeline.backlog.close()
        loop.call_later(self._grace_s, self._abort)

    def _abort(self) -> None:
        if self._workers is not None:
            self._workers.cancel()

    def _fail(self, error: BaseException) -> None:
        """The run can't go on: what is in flight may land, nothing new is sent, the error is raised at the end."""
        if self._failure is None:
            self._failure = error
        if self._gate is not None and self._pipeline is not None:
            code = error.exit_code if isinstance(error, BatchrunError) else ExitCode.INTERNAL_ERROR
            self._gate.close(Stop(code, str(error)))
            self._pipeline.backlog.close()
            if self._checkpoint is not None and self._checkpoint.broken:
                self._abort()  # answers that can't be kept are not waited for: the slots keep their names

    def _open_gate(self, plan: Plan, checkpoint: Checkpoint, loop: asyncio.AbstractEventLoop) -> Gate:
        job, spent = self._job, checkpoint.spent
        state = GateState(
            max_in_flight=job.limits.max_in_flight,
            max_outage_s=job.retry.max_outage_s,
            resumed=plan.resumed,
            uniform=random.random,
            on_change=self._on_phase,
        )
        cap = job.budget.max_cost_usd
        return Gate(
            state,
            loop,
            requests_per_minute=job.limits.requests_per_minute,
            tokens_per_minute=job.limits.tokens_per_minute,
            purse=None if cap is None else Purse(cap, spent.cost_usd() + spent.possibly_billed_usd),
        )

    def _on_phase(self, before: Phase, after: Phase) -> None:
        self._log.write(
            "gate", before=type(before).__name__, after=type(after).__name__, why=getattr(after, "why", None)
        )

    def _chunks(self, plan: Plan, checkpoint: Checkpoint) -> Chunks:
        return Chunks(
            self._directory,
            checkpoint,
            plan.source,
            identities=plan.facts.files,
            rejected=frozenset(plan.facts.rejected),
            types=plan.types,
            schema=plan.schema,
            settings=plan.facts.output,
            json_wanted=wants_json(self._job),
        )

    def _name_lost(self, checkpoint: Checkpoint) -> None:
        """Who was in flight when an earlier process died is on the permanent list, unless their end is on record."""
        lost = [
            entry
            for entry in slots.read(self._directory.inflight)
            if entry is slots.UNREADABLE or not checkpoint.has_end(entry.row, entry.n)
        ]
        if lost:
            checkpoint.name_possibly_billed(_possibly_billed(lost, checkpoint.invocation - 1, "crash"))
            self._hooks.note(f"{len(lost)} requests were in flight when the last process died; they are asked again")

    def _tell_start(self, plan: Plan, checkpoint: Checkpoint) -> None:
        facts, note = plan.facts, self._hooks.note
        if self._credentials.warning:
            note(f"warning: {self._credentials.warning}")
        if plan.resumed:
            done, cost = checkpoint.spent.settled(), checkpoint.spent.cost_usd()
            note(f"resuming {self._directory.path}: {done:,} of {facts.rows:,} rows are done, ${cost:,.6f} spent")
            return
        aside = f", {len(facts.rejected):,} set aside" if facts.rejected else ""
        files = f"{len(plan.source.files)} file{'s' if len(plan.source.files) != 1 else ''}"
        note(f"input: {facts.rows:,} rows in {files}{aside}, read as {facts.dialect}")
        if not facts.rows:
            note("there is nothing to ask: the output will be empty")
        for model, table in plan.prices.items():
            if table is None:
                note(f'the price of {model} is unknown, its cost will be null; give it in [pricing."{model}"]')

    def _finish(self, plan: Plan, checkpoint: Checkpoint, chunks: Chunks) -> Summary:
        """The result is on disk, verified; then the run is marked complete, and what it no longer needs is gone."""
        self._state = "writing"
        directory, settings = self._directory, plan.facts.output
        parts = [
            (directory.part_of(number, chunk.generation), chunk.part_digest or "", chunk.rows)
            for number, chunk in sorted(chunks.sealed.items())
        ]
        if "finished" not in checkpoint.manifest():
            if settings.layout == "parts":
                output.move_parts(parts, directory.completions_folder)
                digest = ""
            else:
                bill = {output.FOOTER_KEY: msgspec.json.encode(_bill(self._summary())).decode()}
                digest = output.assemble(parts, directory.completions, plan.schema, settings.compression, bill)
            output.write_usage(directory.usage, checkpoint.spent.totals.values())
            checkpoint.write_manifest({"finished": msgspec.json.encode({"digest": digest}).decode()})
        checkpoint.close(finished=True)
        for path in (*directory.parts.iterdir(), directory.reserve, directory.inflight):
            path.unlink(missing_ok=True)
        failed = failures(self._summary())
        code = ExitCode.TOO_MANY_FAILURES if failed > self._job.output.max_failures else ExitCode.COMPLETE
        return self.end("complete", code, None)

    def end(self, state: str, exit_code: ExitCode, reason: str | None) -> Summary:
        """The last summary of this invocation is on disk, if the disk takes it."""
        self._state = state
        summary = self._summary(exit_code=int(exit_code), reason=reason)
        self._log.write(state, exit_code=int(exit_code), reason=reason)
        self._write_summary(summary)
        return summary

    def close(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()
        self._log.close()

    def _summary(self, exit_code: int | None = None, reason: str | None = None) -> Summary:
        moment = Moment(
            state=self._state,
            invocation=self._checkpoint.invocation if self._checkpoint is not None else 0,
            started_at=self._started_at,
            now=datetime.now(UTC),
            elapsed_s=time.monotonic() - self._started,
            sent=self._pipeline.sent if self._pipeline is not None else 0,
            limited_by=self._limited_by(),
            pid=os.getpid(),
            host=socket.gethostname(),
            exit_code=exit_code,
            reason=None if reason is None else self._credentials.clean_text(reason),
            complete=self._state == "complete",
        )
        if self._plan is None or self._checkpoint is None:
            return starting(self._job.name, moment, self._directory)
        return summarise(self._plan.facts, self._plan.prices, self._checkpoint.spent, moment, self._directory)

    def _limited_by(self) -> str:
        if self._gate is None:
            return "checking the input" if self._state == "checking" else self._state
        # the gate's clock is monotonic, as time.monotonic is: on Linux the very same
        return limiting_factor(self._gate.binding, time.time() - time.monotonic())

    def _write_summary(self, summary: Summary) -> None:
        try:
            replace_bytes(self._directory.summary, msgspec.json.format(msgspec.json.encode(summary), indent=2))
        except DiskError as error:  # a heartbeat that can't be written must not cost an answer
            self._log.write("summary not written", why=str(error))

    def _reserve(self) -> None:
        """Room that is given back when the disk is full."""
        with open(self._directory.reserve, "wb") as file, contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def _free_reserve(self) -> bool:
        if not self._directory.reserve.exists():
            return False
        self._directory.reserve.unlink()
        return True


def _possibly_billed(lost: Sequence[slots.InFlight], invocation: int, cause: str) -> list[PossiblyBilled]:
    return [
        PossiblyBilled(entry.row, entry.n, entry.key.hex(), entry.upper_bound_usd, cause, invocation) for entry in lost
    ]


def _bill(summary: Summary) -> dict[str, object]:
    """What the footer of the result says of the run: its bill, and that it is whole."""
    names = ("job", "run_id", "rows", "by_status", "totals", "cost_usd", "wasted_usd", "unpriced", "without_usage")
    doubts = ("possibly_billed_count", "possibly_billed_usd", "models", "price")
    bill = {name: getattr(summary, name) for name in (*names, *doubts)}
    return {"version": summary.version, "complete": True, "rows_in_output": summary.rows, **bill}


def _later(loop: asyncio.AbstractEventLoop, call: Callable[[T], None], argument: T) -> None:
    """The call is made in the loop's thread."""
    loop.call_soon_threadsafe(call, argument)


def _first(error: BaseException) -> BaseException:
    """The first exception inside a group: the others are its consequences."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Outside the event loop, while the input is checked or a file is written, a signal ends the run at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number)
        raise RunStoppedError(f"{name.name}: stopped", SIGNALS[name])

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
