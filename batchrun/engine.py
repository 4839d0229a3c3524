"""One start of a run, from the lock to the result. Begin reading here.

    source ─→ request ─→ gate ─→ transport ─→ policy ─→ checkpoint ─→ output ─→ report

    lock      lock the run directory                                       store.rundir
    resume    find out what earlier starts left                            store.checkpoint
    check     read the source, build every request, or accept changes      startup
    dispatch  send every pending row, judge, commit and seal               dispatch
    finish    write result, usage and summary                              store.result

Every way out writes summary.json.
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
from batchrun.dispatch.start_messages import about_cost, start_lines
from batchrun.dispatch.store import CanaryRows, Store
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, CheckpointError, ExitCode, InputError, JobError
from batchrun.job.job import Job
from batchrun.limits.admission import Stop
from batchrun.records import Notice
from batchrun.report.summary import failures, files, read
from batchrun.report.wording import are, plural
from batchrun.row_status import failing
from batchrun.run_summary import Summary
from batchrun.startup import adopt, input_pass, retry, shard
from batchrun.startup import resume as planning
from batchrun.startup.resume import Plan
from batchrun.startup.run_options import RunOptions
from batchrun.store import at_rest, partial, result, shared_dataset, variants
from batchrun.store.carry_over import CarryOver
from batchrun.store.checkpoint import Checkpoint, read_finished
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.tables.files import write_usage

if TYPE_CHECKING:
    from batchrun.dispatch.endpoints import OpenTransports


class Runtime(msgspec.Struct, frozen=True):
    """What makes the event loop (None: asyncio), and what opens the transports (None: this process sends)."""

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
        if (finished := _finished(job, directory, options)) is not None:
            if hooks.host is not None and hooks.host.replay:
                replay.hand_over(replay.result(directory), hooks.host.results)
            hooks.note(Notice(f"{directory.path}: complete already; nothing is sent", "complete already"))
            return finished
        summary, retried = _start(job, directory, credentials, options, hooks, runtime)
        if summary.complete and not retried and _has_rows_to_retry(summary, options, hooks):
            summary, _ = _start(job, directory, credentials, options, hooks, runtime)
        return summary


def _start(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    options: RunOptions,
    hooks: Hooks,
    runtime: Runtime,
) -> tuple[Summary, bool]:
    """The summary at the end of this start, and whether it has sent rows again that were settled before."""
    with (
        _status(job, directory, credentials, hooks) as status,
        _checkpoint(directory, status) as checkpoint,
        signals.raised(),  # until the event loop handles them, and after it
    ):
        store = _check(job, directory, checkpoint, options, status, hooks)
        send = functools.partial(_dispatch, job, credentials, options, status, hooks, runtime)
        if (stop := _canary(job, store, options, status, hooks, send)) is None:
            store = _with_all_chunks(store, hooks)
            stop = send(store)
        summary = _stopped(job, store, stop, status, hooks) if stop else _finish(job, store, status)
        return summary, checkpoint.has_reopened


def _has_rows_to_retry(summary: Summary, options: RunOptions, hooks: Hooks) -> bool:
    """Whether the run has rows to retry, now that the pending ones, which come first, are settled."""
    if options.retry is None or options.stdin is not None or hooks.host is not None:
        return False  # a stream was read already, a host program has received the rows already
    return any(summary.by_status.get(status) for status in options.retry)


# ── lock, resume ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _finished(job: Job, directory: RunDirectory, options: RunOptions) -> Summary | None:
    """The summary of a run that is complete already; None if there is something left to do."""
    directory.given.unlink(missing_ok=True)  # of a start that was killed
    if not (directory.read_summary() or {}).get("complete"):
        return None
    summary = read(directory)
    entries = read_finished(directory.checkpoint)
    known = Manifest.decode(entries)
    shard.require_same(options.shard, known, directory.path)
    planning.require_same_shape(job, known)
    retrying = options.retry is not None
    _, _, changed_settings = variants.place(job, variants.decode(entries), known.variant, retrying=retrying)
    changed_input = adopt.changed_input(input_pass.input_files(job, directory, options), directory, known)
    wanted_rows = known.rows if options.limit is None else min(options.limit, known.rows)
    to_retry = any(summary.by_status.get(status) for status in options.retry or ())
    if changed_settings or changed_input is not None or to_retry or wanted_rows > summary.rows_in_output:
        return None
    result.require_intact(directory, summary.rows_in_output, entries)
    return msgspec.structs.replace(summary, exit_code=int(_exit_code(job, summary)), files=files(directory))


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


# ── check ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, options: RunOptions, status: RunStatus, hooks: Hooks
) -> Store:
    """The store with the plan of this start. Sends nothing; requests that a dead process left are recorded as lost."""
    lost = at_rest.record_lost(directory.inflight, checkpoint)
    if options.shard is None:  # `merge` publishes those of shards, maybe elsewhere
        shared_dataset.try_out(job.output, job.storage)
    plan = planning.make(job, directory, checkpoint, options, status.started_at)
    directory.reserve_room()
    if result.FINISHED in checkpoint.manifest_entries() and checkpoint.totals.settled() < plan.rows:
        # the run was complete with --limit and has more rows now
        chunks = result.restore_parts(plan.manifest, checkpoint, checkpoint.chunks(), directory)
        checkpoint.reopen_chunks(chunks, (), {})
    status.start_running(Running(checkpoint, plan))
    hooks.progress(status.summary())
    retrying = options.retry is not None
    for line in start_lines(job, plan, directory.path, checkpoint.totals, lost, retrying=retrying):
        hooks.note(line)
    if options.retry is not None:
        hooks.note(_reopen_for_retry(plan, directory, checkpoint, options.retry))
    store = _store(plan, directory, checkpoint, hooks)
    store.chunks.remove_orphans()
    if hooks.host is not None and hooks.host.replay:
        replay.hand_over(store.chunks.settled(), hooks.host.results)
    return store


def _reopen_for_retry(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, statuses: frozenset[str]) -> str:
    """Makes rows with one of the statuses pending again, unless rows are pending already; returns a line about it.

    Raises:
        JobError: rows are pending that this start would send with other settings.
    """
    pending = plan.rows - checkpoint.totals.settled()
    entries = variants.encode(plan.variants)
    if pending and checkpoint.manifest_entries()[variants.ENTRY] != entries[variants.ENTRY]:
        raise JobError(
            f"{plural(pending, 'row')} {are(pending)} still pending with the earlier settings; "
            "finish the run with those, then retry"
        )
    if pending:
        return Notice(f"{plural(pending, 'row')} {are(pending)} still pending; sent first", "retry", pending=pending)
    mean_cost_usd = checkpoint.totals.mean_cost_usd()
    rows = retry.reopen(plan, directory, checkpoint, statuses, plan.variant, entries)
    ended = f"{plural(rows, 'row')} that ended as {', '.join(sorted(statuses))}"
    return Notice(f"{ended} will be sent again{about_cost(rows, mean_cost_usd)}", "retry", rows=rows)


def _store(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, hooks: Hooks) -> Store:
    layout = Layout(
        source=plan.source,
        identities=plan.manifest.files,
        rejected=frozenset(plan.manifest.rejected),
        types=plan.types,
        schema=plan.schema,
        settings=plan.manifest.output,
        parsed=plan.parsed,
        number=plan.manifest.layout,
        limit=plan.rows if plan.rows < plan.manifest.rows else None,
        first_row=plan.manifest.first_row,
    )
    model = next(iter(plan.manifest.models), "")
    path = directory.origins_of(plan.manifest.layout)
    carry = CarryOver(plan.origins, path, variant=plan.manifest.variant, model=model)
    hand_over = None if hooks.host is None else functools.partial(replay.hand_over, results=hooks.host.results)
    otel = hooks.otel
    opened = None if otel is None else otel.chunk_opened
    chunks = Chunks(directory, checkpoint, layout, carry, hand_over, hooks.mirror)
    return Store(directory, checkpoint, plan, chunks, before_usd=checkpoint.totals.most_usd(), opened=opened)


# ── canary ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _canary(
    job: Job,
    store: Store,
    options: RunOptions,
    status: RunStatus,
    hooks: Hooks,
    send: Callable[[Store], Stop | None],
) -> Stop | None:
    """A few rows are settled, and why the rest is not sent; None where it may be, or the job wants no canary."""
    known = None if job.canary.rows is None else canary.record_of(job, store)
    if job.canary.rows is None or (known is None and store.pending <= job.canary.rows):
        return None
    if known is None:
        known = canary.choose(job, store)
        if known.rows:
            line = f"canary: {plural(len(known.rows), 'row')}, spread over the input, are sent first"
            hooks.note(Notice(line, "canary", rows=len(known.rows)))
    if not known.rows:  # every row takes an answer without a request
        return None
    if (seen := known.seen) is None:
        of_canary = msgspec.structs.replace(_with_all_chunks(store, hooks), canary=CanaryRows(known.rows))
        if (stop := send(of_canary)) is not None:
            return stop
        seen = canary.look(store.checkpoint, known.rows)
        status.log.write("canary", **msgspec.to_builtins(seen))
    known = msgspec.structs.replace(known, seen=seen, accepted=known.accepted or options.accept_canary)
    canary.keep(store.checkpoint, known)
    problems = list(canary.judge(seen, job.canary))
    if problems and not known.accepted:
        return canary.stop(seen, problems, store)
    if store.pending:
        line = f"canary {'accepted' if problems else 'passed'}: {canary.in_words(seen)}; the rest is sent"
        hooks.note(Notice(line, "canary", passed=not problems, **msgspec.structs.asdict(seen)))
    return None


def _with_all_chunks(store: Store, hooks: Hooks) -> Store:
    """The store, with none of its chunks opened in this process yet."""
    return msgspec.structs.replace(store, chunks=_store(store.plan, store.directory, store.checkpoint, hooks).chunks)


# ── dispatch ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _dispatch(
    job: Job,
    credentials: Credentials,
    options: RunOptions,
    status: RunStatus,
    hooks: Hooks,
    runtime: Runtime,
    store: Store,
) -> Stop | None:
    """Sends every pending row, in a canary every row of it; why the run stopped before the last, if it did."""
    if not store.pending:
        return None
    from batchrun.dispatch.dispatch import Dispatch  # here, because a complete run does not need aiohttp: 0.25 s

    dispatch = Dispatch(job, store, credentials, status, hooks, options.deadline, runtime.open_transports)
    try:
        with asyncio.Runner(loop_factory=runtime.loop_factory) as runner:
            return runner.run(dispatch.send_all())
    except BatchrunError:
        _write_unfinished(job, store, status, hooks)
        raise


def _stopped(job: Job, store: Store, stop: Stop, status: RunStatus, hooks: Hooks) -> Summary:
    status.end("stopped", stop.exit_code, stop.why)  # first, since the rest may take long, or be killed
    _write_unfinished(job, store, status, hooks)
    summary = status.summary(int(stop.exit_code), stop.why)
    status.write(summary)
    return summary


def _write_unfinished(job: Job, store: Store, status: RunStatus, hooks: Hooks) -> None:
    """Writes usage.parquet of a run that is not complete, and the rows so far if the job has `output.partial`.

    A signal ends it. Neither that nor a failure here changes the exit code.
    """
    directory, plan = store.directory, store.plan
    try:
        write_usage(directory.usage, store.checkpoint.totals.lines())
        if not job.output.partial:
            return
        line = f"writing the rows so far: {directory.partial} (send a signal to skip that)"
        hooks.note(Notice(line, "writing partial", path=directory.partial))
        with signals.raised():
            batches = _store(plan, directory, store.checkpoint, hooks).chunks.so_far()
            compression = plan.manifest.output.compression
            partial.write(directory.partial, batches, plan.schema, compression, status.summary())
    except BatchrunError as error:
        status.log.write("export failed", why=str(error))
        line = f"warning: {error}; batchrun export {directory.path} writes the rows so far"
        hooks.note(Notice(line, "export failed", why=str(error)))


# ── finish ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _finish(job: Job, store: Store, status: RunStatus) -> Summary:
    """Writes the result; the exit code says whether more rows failed than the job allows."""
    with signals.raised():  # the event loop has removed these handlers at its end
        if (unsettled := store.chunks.open_next()) is not None:
            raise CheckpointError(f"chunk {unsettled.chunk.chunk} has pending rows that the totals count as settled")
        status.start_writing()
        memory.give_back()  # a file's footer, which grows with its rows, gets what sending has freed
        plan = store.plan
        written = result.write(
            plan.manifest, plan.schema, store.checkpoint, store.chunks, store.directory, status.summary()
        )
        if job.output.dataset is not None and not plan.manifest.is_sharded:  # `merge` publishes the shards together
            dataset, run_id = job.output.dataset, plan.manifest.run_id
            partitions = shared_dataset.publish(written, store.directory, dataset, run_id, job.storage)
            status.log.write("partitions published", dataset=dataset, partitions=partitions)
        return status.end("complete", _exit_code(job, status.summary()), None)


def _exit_code(job: Job, summary: Summary) -> ExitCode:
    """The exit code of a complete run, by the number of failures that the job allows now."""
    failed = failures(summary, failing(job.finish))
    return ExitCode.TOO_MANY_FAILURES if failed > job.output.max_failures else ExitCode.COMPLETE
