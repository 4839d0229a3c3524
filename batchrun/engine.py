"""One start of a run, from the lock to the result. Start reading here.

    source ─→ request ─→ limits ─→ transport ─→ policy ─→ store ─→ tables ─→ report

    lock      lock the run directory                                       store.rundir
    resume    read what earlier starts have left                           store.checkpoint, startup.resume
    check     read the input and build every request once                  startup.input_pass
    dispatch  send every pending row, judge, commit and seal               dispatch
    finish    write result, usage and summary                              store.result

`run` calls these steps in their order; they are methods of `Invocation`. Every way out writes summary.json.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from batchrun import __version__, memory, signals
from batchrun.credentials import Credentials
from batchrun.dispatch import canary, live_limits, replay
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.run_status import Checking, Running, RunStatus
from batchrun.dispatch.start_messages import start_lines
from batchrun.dispatch.store import CanaryRows, Store
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, CheckpointError, ExitCode, InputError, JobError, quoted
from batchrun.job.job import Job
from batchrun.limits.admission import Stop
from batchrun.records import Notice
from batchrun.run_summary import Summary
from batchrun.startup import complete_run, resume, retry
from batchrun.startup.resume import Plan
from batchrun.startup.run_options import RunOptions
from batchrun.store import at_rest, partial, result, shared_dataset
from batchrun.store.carry_over import CarryOver
from batchrun.store.checkpoint import Checkpoint, read_finished
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.rundir import RunDirectory
from batchrun.tables.files import write_usage

if TYPE_CHECKING:
    from batchrun.dispatch.endpoints import OpenTransports


class Runtime(msgspec.Struct, frozen=True):
    """The factories of the event loop (None: asyncio) and of the transports (None: this process sends)."""

    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    open_transports: "OpenTransports | None" = None


def run(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    options: RunOptions = RunOptions(),  # noqa: B008  (frozen)
    hooks: Hooks = Hooks(),  # noqa: B008  (frozen)
    runtime: Runtime = Runtime(),  # noqa: B008  (frozen)
) -> Summary:
    """Works on the run until it is complete or has to stop, as the summary says; the same call resumes it. Blocks.

    Raises:
        BatchrunError: the run could not start, or failed; what was received is on disk, and summary.json says why.
    """
    directory.create()
    with directory.lock():
        if (finished := complete_run.summary_of(job, directory, options)) is not None:
            if hooks.host is not None and hooks.host.replay:
                replay.hand_over(replay.result(directory), hooks.host.results)
            hooks.note(Notice(f"{directory.path}: complete already; nothing is sent", "complete already"))
            return finished
        for _ in range(2):  # rows are retried in a second start, when the pending ones, which come first, are settled
            with (
                _status(job, directory, credentials, hooks) as status,
                _checkpoint(directory, status) as checkpoint,
                signals.raised(),  # until the event loop handles them, and after it
            ):
                start = Invocation(job, directory, credentials, options, hooks, runtime, status, checkpoint)
                store = start.check()
                if (stop := start.canary(store)) is None:
                    store = start.at_first_chunk(store)
                    stop = start.dispatch(store)
                summary = start.finish(store) if stop is None else start.stop(store, stop)
            if checkpoint.has_reopened or not (summary.complete and start.has_rows_to_retry(summary)):
                break
        return summary


class Invocation(msgspec.Struct, frozen=True):
    """One start in the locked directory, with its open status and checkpoint: its steps in their order."""

    job: Job
    directory: RunDirectory
    credentials: Credentials
    options: RunOptions
    hooks: Hooks
    runtime: Runtime
    status: RunStatus
    checkpoint: Checkpoint

    def check(self) -> Store:
        """The store with the plan of this start. Sends nothing; requests that a dead process left are recorded as lost.

        Raises:
            JobError, InputError: the job or the input is invalid, or has changed.
        """
        job, directory, checkpoint, hooks = self.job, self.directory, self.checkpoint, self.hooks
        lost = at_rest.record_lost(directory.inflight, checkpoint)
        if self.options.shard is None:  # `merge` publishes those of shards, maybe elsewhere
            shared_dataset.try_out(job.output, job.storage)
        plan = resume.plan_start(job, directory, checkpoint, self.options, self.status.started_at)
        directory.reserve_room()
        if result.FINISHED in checkpoint.manifest_entries() and checkpoint.totals.settled() < plan.rows:
            # the run was complete with --limit and has more rows now
            chunks = result.restore_parts(plan.manifest, checkpoint, checkpoint.chunks(), directory)
            checkpoint.reopen_chunks(chunks, (), {})
        found = checkpoint.totals
        # the last thing that may be refused
        retrying = None if self.options.retry is None else retry.reopen(plan, directory, checkpoint, self.options.retry)
        self.status.start_running(Running(checkpoint, plan))
        hooks.progress(self.status.summary())
        for line in start_lines(job, plan, directory.path, found, lost, retrying=retrying is not None):
            hooks.note(line)
        if retrying is not None:
            hooks.note(retrying)
        chunks_opened = None if hooks.otel is None else hooks.otel.chunk_opened
        before_usd = checkpoint.totals.most_usd()
        store = Store(directory, checkpoint, plan, self._chunks(plan), before_usd=before_usd, opened=chunks_opened)
        store.chunks.remove_orphans()
        if hooks.host is not None and hooks.host.replay:
            replay.hand_over(store.chunks.settled(), hooks.host.results)
        return store

    def canary(self, store: Store) -> Stop | None:
        """Settles the rows of the job's canary first, if it wants one; why the rest is not sent, if so."""
        if self.job.canary.rows is None:
            return None

        def send(rows: CanaryRows) -> Stop | None:
            return self.dispatch(msgspec.structs.replace(self.at_first_chunk(store), canary=rows))

        accept = self.options.accept_canary
        return canary.run(self.job, store, send, self.hooks.note, self.status.log, accept=accept)

    def dispatch(self, store: Store) -> Stop | None:
        """Sends every pending row, in a canary every row of it; why the run stopped before the last, if it did."""
        if not store.pending:
            return None
        from batchrun.dispatch.dispatch import Dispatch  # here, because a complete run does not need aiohttp: 0.25 s

        dispatch = Dispatch(
            self.job,
            store,
            self.credentials,
            self.status,
            self.hooks,
            self.options.deadline,
        )
        try:
            with asyncio.Runner(loop_factory=self.runtime.loop_factory) as runner:
                return runner.run(dispatch.send_all(self.runtime.open_transports))
        except BatchrunError:
            self._write_unfinished(store)
            raise

    def finish(self, store: Store) -> Summary:
        """Writes the result; the exit code says whether more rows failed than the job allows."""
        with signals.raised():  # the event loop has removed these handlers at its end
            if (unsettled := store.chunks.open_next()) is not None:
                number = unsettled.chunk.chunk
                raise CheckpointError(f"chunk {number} has pending rows that the totals count as settled")
            self.status.start_writing()
            memory.give_back()  # a file's footer, which grows with its rows, gets what sending has freed
            plan, output = store.plan, self.job.output
            written = result.write(
                plan.manifest, plan.schema, self.checkpoint, store.chunks, self.directory, self.status.summary()
            )
            if output.dataset is not None and not plan.manifest.is_sharded:  # `merge` publishes the shards together
                partitions = shared_dataset.publish(
                    written, self.directory, output.dataset, plan.manifest.run_id, self.job.storage
                )
                self.status.log.write("partitions published", dataset=output.dataset, partitions=partitions)
            return self.status.end("complete", complete_run.exit_code(self.job, self.status.summary()), None)

    def stop(self, store: Store, stop: Stop) -> Summary:
        """Ends the start before the run is complete, with the rows so far."""
        self.status.end("stopped", stop.exit_code, stop.why)  # first, since the rest may take long, or be killed
        self._write_unfinished(store)
        summary = self.status.summary(int(stop.exit_code), stop.why)
        self.status.write(summary)
        return summary

    def has_rows_to_retry(self, summary: Summary) -> bool:
        """Whether the complete run has rows to retry, and this process can start again for them."""
        if self.options.retry is None or self.options.stdin is not None or self.hooks.host is not None:
            return False  # a stream was read already, a host program has received the rows already
        return any(summary.by_status.get(status) for status in self.options.retry)

    def at_first_chunk(self, store: Store) -> Store:
        """The store. This process has not opened any of its chunks yet."""
        return msgspec.structs.replace(store, chunks=self._chunks(store.plan))

    def _chunks(self, plan: Plan) -> Chunks:
        model = next(iter(plan.manifest.models), "")
        path = self.directory.origins_of(plan.manifest.layout)
        carry = CarryOver(plan.origins, path, variant=plan.manifest.variant, model=model)
        host = self.hooks.host
        hand_over = None if host is None else functools.partial(replay.hand_over, results=host.results)
        layout = Layout.of(plan.manifest, plan.source, plan.schema, plan.rows)
        return Chunks(self.directory, self.checkpoint, layout, carry, hand_over, self.hooks.mirror)

    def _write_unfinished(self, store: Store) -> None:
        """Writes usage.parquet of a run that is not complete, and the rows so far if the job has `output.partial`.

        A signal ends it. Neither that nor a failure here changes the exit code.
        """
        directory, plan = self.directory, store.plan
        try:
            write_usage(directory.usage, self.checkpoint.totals.lines())
            if not self.job.output.partial:
                return
            line = f"writing the rows so far: {directory.partial} (send a signal to skip that)"
            self.hooks.note(Notice(line, "writing partial", path=directory.partial))
            with signals.raised():
                batches, compression = self._chunks(plan).so_far(), plan.manifest.output.compression
                partial.write(directory.partial, batches, plan.schema, compression, self.status.summary())
        except BatchrunError as error:
            self.status.log.write("export failed", why=str(error))
            line = f"warning: {error}; batchrun export {quoted(directory.path)} writes the rows so far"
            self.hooks.note(Notice(line, "export failed", why=str(error)))


@contextlib.contextmanager
def _status(job: Job, directory: RunDirectory, credentials: Credentials, hooks: Hooks) -> Iterator[RunStatus]:
    """The status of the run, in summary.json from now on; an exception in the block is its last state."""
    live_limits.clear(directory)
    was_complete = (directory.read_summary() or {}).get("complete")
    summary_before = directory.summary.read_bytes() if was_complete else None
    status = RunStatus(job.name, directory, credentials, hooks.command, job.job.tags, hooks.views)
    try:
        hooks.progress(status.summary())
        if credentials.warning:
            hooks.note(Notice(f"warning: {credentials.warning}", "key file"))
        yield status
    except BatchrunError as error:
        status.end("failed", error.exit_code, str(error))
        was_refused = summary_before is not None and isinstance(error, JobError | InputError)
        entries = read_finished(directory.checkpoint) if was_refused else {}
        if was_refused and result.FINISHED in entries:
            # this start may not change a complete run, which is complete as before
            result.tidy(directory, result.finished(entries))
            replace_bytes(directory.summary, summary_before or b"")
        raise
    except BaseException as error:
        status.end("failed", ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        live_limits.clear(directory)
        status.close()


@contextlib.contextmanager
def _checkpoint(directory: RunDirectory, status: RunStatus) -> Iterator[Checkpoint]:
    """The open checkpoint, in which this invocation has its number."""
    with contextlib.closing(Checkpoint(directory.checkpoint, free_reserve=directory.free_room)) as checkpoint:
        status.reached(Checking(checkpoint))
        started_at = status.started_at.timestamp()
        checkpoint.start_invocation(started_at, os.getpid(), socket.gethostname(), __version__)
        yield checkpoint
