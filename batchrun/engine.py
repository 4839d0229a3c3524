"""One start of a run: this process's share of it. The picture of the whole:

    source ─→ request ─→ gate ─→ transport ─→ policy ─→ checkpoint ─→ output ─→ report

    lock      the directory is this process's alone                        rundir
    resume    what earlier starts left: complete, stopped, or killed       checkpoint
    check     the source is read, every request built; or changes adopted  plan
    dispatch  every pending row is sent, judged, durable, sealed           dispatch
    finish    parts become the result, usage and summary                   output, report

Every way out leaves a summary.json that says where the run stands.
"""

import asyncio
import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator

import msgspec

from batchrun import __version__, signals
from batchrun.credentials import Credentials
from batchrun.dispatch import live_limits, replay
from batchrun.dispatch.dispatch import Dispatch
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.run_status import Checking, Running, RunStatus
from batchrun.dispatch.start_messages import about_cost, start_lines
from batchrun.dispatch.store import Store
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, CheckpointError, ExitCode, InputError, JobError
from batchrun.job.job import Job
from batchrun.limits.admission import Stop
from batchrun.policy import failing
from batchrun.records import Summary
from batchrun.report.summary import failures, files, read
from batchrun.report.wording import are, plural
from batchrun.startup import input_pass, retry
from batchrun.startup import resume as planning
from batchrun.startup.resume import Plan
from batchrun.startup.run_options import RunOptions
from batchrun.store import at_rest, manifest, partial, result, variants
from batchrun.store.carry_over import CarryOver
from batchrun.store.checkpoint import Checkpoint, read_finished
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.rundir import RunDirectory
from batchrun.tables.files import write_usage

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def run(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    asked: RunOptions = RunOptions(),  # noqa: B008  (frozen)
    hooks: Hooks = Hooks(),  # noqa: B008  (frozen)
    loop_factory: LoopFactory | None = None,
) -> Summary:
    """The run is complete, or stopped as its summary says; the same call resumes it. Blocks.

    Raises:
        BatchrunError: the run could not start or go on; what was received is on disk, and summary.json says why.
    """
    directory.create()
    with directory.lock():
        if (finished := _finished(job, directory, asked)) is not None:
            _replay_finished(directory, hooks)
            return finished
        summary, retried = _start(job, directory, credentials, asked, hooks, loop_factory)
        if summary.complete and not retried and _to_retry(summary, asked, hooks):
            summary, _ = _start(job, directory, credentials, asked, hooks, loop_factory)
        return summary


def _start(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    asked: RunOptions,
    hooks: Hooks,
    loop_factory: LoopFactory | None,
) -> tuple[Summary, bool]:
    """How this start ended, and whether rows that were settled before were sent in it."""
    with (
        _status(job, directory, credentials, hooks) as status,
        _checkpoint(directory, status) as checkpoint,
        signals.raised(),  # while the event loop does not listen itself
    ):
        store = _check(job, directory, checkpoint, asked, status, hooks)
        stop = _dispatch(job, store, credentials, asked, status, hooks, loop_factory)
        summary = _stopped(job, store, stop, status, hooks) if stop else _finish(job, store, status)
        return summary, checkpoint.has_reopened


def _to_retry(summary: Summary, asked: RunOptions, hooks: Hooks) -> bool:
    """Whether rows that a retry is about are left once the pending ones, which came first, are settled.

    Not where rows come by a stream, which is read, or go to a program, which has them.
    """
    if asked.retry is None or asked.stdin is not None or hooks.host is not None:
        return False
    return any(summary.by_status.get(status) for status in asked.retry)


# ── lock, resume ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _finished(job: Job, directory: RunDirectory, asked: RunOptions) -> Summary | None:
    """The summary of a run that is complete already, untouched; None where there is still something to do."""
    directory.given.unlink(missing_ok=True)  # what a start that was killed had been given
    if not (directory.read_summary() or {}).get("complete"):
        return None
    summary = read(directory)
    entries = read_finished(directory.checkpoint)
    known = manifest.read(entries)
    planning.require_same_shape(job, known)
    _, _, settings = variants.place(job, variants.read(entries), known.variant, retrying=asked.retry is not None)
    what = planning.changed_input(input_pass.input_files(job, directory, asked), directory, known)
    wanted = known.rows if asked.limit is None else min(asked.limit, known.rows)
    again = asked.retry is not None and any(summary.by_status.get(status) for status in asked.retry)
    if settings or what is not None or again or wanted > summary.rows_in_output:
        return None
    result.require_there(directory, known.output.layout, summary.rows_in_output, entries)
    return msgspec.structs.replace(summary, exit_code=int(_exit_code(job, summary)), files=files(directory))


def _replay_finished(directory: RunDirectory, hooks: Hooks) -> None:
    """A program that reads the run has its rows."""
    if hooks.host is not None and hooks.host.replay:
        replay.hand_over(replay.result(directory), hooks.host.results)
    hooks.note(f"{directory.path}: complete already; nothing is sent")


@contextlib.contextmanager
def _status(job: Job, directory: RunDirectory, credentials: Credentials, hooks: Hooks) -> Iterator[RunStatus]:
    """What is known of the run is in summary.json, from now to whichever end the block has."""
    live_limits.clear(directory)
    complete_before = _complete_summary(directory)
    status = RunStatus(job.name, directory, credentials, hooks.command, job.job.tags)
    try:
        hooks.progress(status.summary())
        if credentials.warning:
            hooks.note(f"warning: {credentials.warning}")
        yield status
    except BatchrunError as error:
        status.end("failed", error.exit_code, str(error))
        if complete_before is not None and isinstance(error, JobError | InputError):
            _restore_complete(directory, complete_before)
        raise
    except BaseException as error:
        status.end("failed", ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        live_limits.clear(directory)
        status.close()


def _complete_summary(directory: RunDirectory) -> bytes | None:
    """The summary of a complete run as it is, None where there is none."""
    complete = (directory.read_summary() or {}).get("complete")
    return directory.summary.read_bytes() if complete else None


def _restore_complete(directory: RunDirectory, summary: bytes) -> None:
    """A complete run that this start was refused to change is complete as before."""
    if result.FINISHED in read_finished(directory.checkpoint):
        result.tidy(directory)
        replace_bytes(directory.summary, summary)


@contextlib.contextmanager
def _checkpoint(directory: RunDirectory, status: RunStatus) -> Iterator[Checkpoint]:
    """The checkpoint is open, and this invocation has its number."""
    with contextlib.closing(Checkpoint(directory.checkpoint, free_reserve=directory.free_room)) as checkpoint:
        status.reached(Checking(checkpoint))
        started_at = status.started_at.timestamp()
        checkpoint.begin_invocation(started_at, os.getpid(), socket.gethostname(), __version__)
        yield checkpoint


# ── check ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: RunOptions, status: RunStatus, hooks: Hooks
) -> Store:
    """What this start is to do is settled, and nothing was sent. Attempts that a dead process left are named."""
    lost = at_rest.name_lost(directory.inflight, checkpoint, with_ids=bool(job.endpoint.id_header))
    plan = planning.make(job, directory, checkpoint, asked, status.started_at)
    directory.reserve_room()
    _unfinish(plan, directory, checkpoint)
    status.start_running(Running(checkpoint, plan))
    retrying = asked.retry is not None
    for line in start_lines(job, plan, directory.path, checkpoint.spent, lost, retrying=retrying):
        hooks.note(line)
    if asked.retry is not None:
        hooks.note(_retried(plan, directory, checkpoint, asked.retry))
    store = _store(plan, directory, checkpoint, hooks)
    store.chunks.remove_orphans()
    if hooks.host is not None and hooks.host.replay:
        replay.hand_over(store.chunks.settled(), hooks.host.results)
    return store


def _unfinish(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint) -> None:
    """A finished pilot of the first rows is an open run again, if there are more rows to send."""
    if result.FINISHED in checkpoint.manifest() and checkpoint.spent.settled() < plan.rows:
        chunks = result.restore_parts(plan.facts, checkpoint, checkpoint.chunks(), directory)
        checkpoint.reopen_chunks(chunks, (), {})


def _retried(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, statuses: frozenset[str]) -> str:
    """Rows that ended with one of the statuses are pending again, unless rows are pending already; what to say of it.

    Raises:
        JobError: rows are pending, and this start would send them otherwise than was meant.
    """
    pending = plan.rows - checkpoint.spent.settled()
    entries = variants.encode(plan.variants)
    if pending and checkpoint.manifest()[variants.ENTRY] != entries[variants.ENTRY]:
        raise JobError(
            f"{plural(pending, 'row')} {are(pending)} still pending as asked before; finish the run, then retry"
        )
    if pending:
        return f"{plural(pending, 'row')} {are(pending)} still pending; sent first"
    mean_cost_usd = checkpoint.spent.mean_cost_usd()
    rows = retry.reopen(plan, directory, checkpoint, statuses, plan.variant, entries)
    ended = f"{plural(rows, 'row')} that ended as {', '.join(sorted(statuses))}"
    return f"{ended} {are(rows)} asked again{about_cost(rows, mean_cost_usd)}"


def _store(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, hooks: Hooks) -> Store:
    layout = Layout(
        source=plan.source,
        identities=plan.facts.files,
        rejected=frozenset(plan.facts.rejected),
        types=plan.types,
        schema=plan.schema,
        settings=plan.facts.output,
        parsed=plan.parsed,
        number=plan.facts.layout,
        limit=plan.rows if plan.rows < plan.facts.rows else None,
    )
    model = next(iter(plan.facts.models), "")
    path = directory.origins_of(plan.facts.layout)
    carry = CarryOver(plan.origins, path, variant=plan.facts.variant, model=model)
    hand_over = None if hooks.host is None else functools.partial(replay.hand_over, results=hooks.host.results)
    return Store(directory, checkpoint, plan, Chunks(directory, checkpoint, layout, carry, hand_over))


# ── dispatch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _dispatch(
    job: Job,
    store: Store,
    credentials: Credentials,
    asked: RunOptions,
    status: RunStatus,
    hooks: Hooks,
    loop_factory: LoopFactory | None,
) -> Stop | None:
    """Every pending row is settled, or why not."""
    if not store.pending:
        return None
    rows = Dispatch(job, store, credentials, status, hooks, asked.deadline)
    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(rows.send_all())
    except BatchrunError:
        _leave(job, store, status, hooks)
        raise


def _stopped(job: Job, store: Store, stop: Stop, status: RunStatus, hooks: Hooks) -> Summary:
    status.end("stopped", stop.exit_code, stop.why)  # first: what follows may take long, or be killed
    _leave(job, store, status, hooks)
    summary = status.summary(int(stop.exit_code), stop.why)
    status.write(summary)
    return summary


def _leave(job: Job, store: Store, status: RunStatus, hooks: Hooks) -> None:
    """The bill of a run that is not complete is in usage.parquet, and its rows so far are beside it if the job says so.

    A failure here, and a signal, which ends it at once, change nothing of the way out.
    """
    directory, plan = store.directory, store.plan
    try:
        write_usage(directory.usage, store.checkpoint.spent.lines())
        if not job.output.partial:
            return
        hooks.note(f"writing the rows so far: {directory.partial} (a signal ends that)")
        with signals.raised():
            batches = _store(plan, directory, store.checkpoint, hooks).chunks.so_far()
            compression = plan.facts.output.compression
            partial.write(directory.partial, batches, plan.schema, compression, status.summary())
    except BatchrunError as error:
        status.log.write("export failed", why=str(error))
        hooks.note(f"warning: {error}; batchrun export {directory.path} writes the rows so far")


# ── finish ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish(job: Job, store: Store, status: RunStatus) -> Summary:
    """The result is written; the exit code says whether more rows failed than the job allows."""
    with signals.raised():  # the event loop that has ended took its own handlers along
        if (unsettled := store.chunks.open_next()) is not None:
            raise CheckpointError(f"chunk {unsettled.chunk.chunk}: has pending rows that the totals count as settled")
        status.start_writing()
        plan = store.plan
        result.write(plan.facts, plan.schema, store.checkpoint, store.chunks, store.directory, status.summary())
        return status.end("complete", _exit_code(job, status.summary()), None)


def _exit_code(job: Job, summary: Summary) -> ExitCode:
    """The code of a complete run, by the failures that the job allows now."""
    failed = failures(summary, failing(job.finish))
    return ExitCode.TOO_MANY_FAILURES if failed > job.output.max_failures else ExitCode.COMPLETE
