"""One invocation: one start of a run, this process's share of it. The picture of the whole:

    source ─→ request ─→ gate ─→ transport ─→ policy ─→ checkpoint ─→ output ─→ report

A start takes the lock, makes its plan (`plan`: the source is read and checked, or the run is gone on with), has every
pending row asked (`asking`: the workers of `pipeline` walk request, gate, transport, policy and checkpoint; full chunks
become parts), and writes the result. Every way out leaves a summary.json that says where the run stands.
"""

import asyncio
import os
import socket
from collections.abc import Callable

import msgspec

from batchrun import __version__, signals
from batchrun.asking import asking, control, replay
from batchrun.asking.asking import Asking, Hooks
from batchrun.asking.chronicle import Chronicle
from batchrun.asking.opening import about, told_at_start
from batchrun.checkpoint import at_rest, facts, variants
from batchrun.checkpoint.checkpoint import Checkpoint, read_finished
from batchrun.credentials import Credentials
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, CheckpointError, ExitCode, InputError, JobError
from batchrun.job.job import Job
from batchrun.output import partial, result
from batchrun.output.chunks import Chunks
from batchrun.output.files import write_usage
from batchrun.plan import plan as planning
from batchrun.plan import reading, retry
from batchrun.plan.asked import Asked
from batchrun.plan.plan import Plan
from batchrun.policy import failing
from batchrun.records import Summary
from batchrun.report.summary import are, failures, files, plural, read
from batchrun.rundir import RunDirectory

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def run(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    asked: Asked = Asked(),  # noqa: B008  (frozen)
    hooks: Hooks = Hooks(),  # noqa: B008  (frozen)
    *,
    grace_s: float = asking.GRACE_S,
    loop_factory: LoopFactory | None = None,
) -> Summary:
    """The run is complete, or stopped as its summary says; the same call goes on with it. Blocks.

    Raises:
        BatchrunError: the run could not start or go on; what was received is on disk, and summary.json says why.
    """
    directory.create()
    with directory.lock():
        directory.given.unlink(missing_ok=True)  # what a start that was killed had been given
        if (finished := _finished(job, directory, asked)) is not None:
            if hooks.host is not None and hooks.host.replay:
                replay.hand_over(replay.result(directory), hooks.host.delivery)
            hooks.note(f"{directory.path}: complete already; nothing is sent")
            return finished
        control.clear(directory)
        at_rest = _at_rest(directory)
        chronicle = Chronicle(job.name, directory, credentials, hooks.command, job.job.tags)
        try:
            hooks.progress(chronicle.summary())
            checkpoint = Checkpoint(directory.checkpoint, free_reserve=directory.free_room)
            try:
                return _run(job, directory, credentials, checkpoint, chronicle, asked, hooks, grace_s, loop_factory)
            finally:
                checkpoint.close()
        except BatchrunError as error:
            chronicle.end("failed", error.exit_code, str(error))
            if at_rest is not None and isinstance(error, JobError | InputError):
                _rest_again(directory, at_rest)
            raise
        except BaseException as error:
            chronicle.end("failed", ExitCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")
            raise
        finally:
            control.clear(directory)
            chronicle.close()


def _run(
    job: Job,
    directory: RunDirectory,
    credentials: Credentials,
    checkpoint: Checkpoint,
    chronicle: Chronicle,
    asked: Asked,
    hooks: Hooks,
    grace_s: float,
    loop_factory: LoopFactory | None,
) -> Summary:
    """Plan, ask, write: this process's share of the run."""
    chronicle.checkpoint = checkpoint
    checkpoint.begin_invocation(chronicle.started_at.timestamp(), os.getpid(), socket.gethostname(), __version__)
    lost = at_rest.name_lost(directory.inflight, checkpoint, with_ids=bool(job.endpoint.id_header))
    with signals.raised():  # until the event loop listens itself
        plan = planning.make(job, directory, checkpoint, asked, chronicle.started_at)
        directory.reserve_room()
        _unfinish(plan, directory, checkpoint)
        _begin(plan, checkpoint, chronicle)
        if credentials.warning:
            hooks.note(f"warning: {credentials.warning}")
        for line in told_at_start(job, plan, directory.path, checkpoint.spent, lost, retrying=asked.retry is not None):
            hooks.note(line)
        if asked.retry is not None:
            hooks.note(_retried(plan, directory, checkpoint, asked.retry))
        chunks = _chunks(plan, directory, checkpoint)
        chunks.remove_orphans()
        if hooks.host is not None and hooks.host.replay:
            replay.hand_over(chunks.settled(), hooks.host.delivery)
        if checkpoint.spent.settled() < plan.rows:
            chronicle.deadline = asked.deadline
            rows = Asking(
                job, plan, directory, credentials, checkpoint, chunks, chronicle, hooks, grace_s, asked.deadline
            )
            try:
                with asyncio.Runner(loop_factory=loop_factory) as runner:
                    stop = runner.run(rows.ask())
            except BatchrunError:
                _leave(job, plan, directory, checkpoint, chronicle, hooks)
                raise
            if stop is not None:
                chronicle.end("stopped", stop.exit_code, stop.why)  # first: what follows may take long, or be killed
                _leave(job, plan, directory, checkpoint, chronicle, hooks)
                summary = chronicle.summary(int(stop.exit_code), stop.why)
                chronicle.write(summary)
                return summary
    with signals.raised():
        return _finish(job, plan, directory, checkpoint, chunks, chronicle)


def _leave(
    job: Job, plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, chronicle: Chronicle, hooks: Hooks
) -> None:
    """The bill of a run that is not complete is in usage.parquet, and its rows so far are beside it if the job says so.

    A failure here, and a signal, which ends it at once, change nothing of the way out.
    """
    try:
        write_usage(directory.usage, checkpoint.spent.lines())
        if not job.output.partial:
            return
        hooks.note(f"writing the rows so far: {directory.partial} (a signal ends that)")
        with signals.raised():
            batches = _chunks(plan, directory, checkpoint).so_far()
            compression = plan.facts.output.compression
            partial.write(directory.partial, batches, plan.schema, compression, chronicle.summary())
    except BatchrunError as error:
        chronicle.log.write("export failed", why=str(error))
        hooks.note(f"warning: {error}; batchrun export {directory.path} writes the rows so far")


def _at_rest(directory: RunDirectory) -> bytes | None:
    """The summary of a complete run as it is, None where there is none."""
    complete = (directory.read_summary() or {}).get("complete")
    return directory.summary.read_bytes() if complete else None


def _rest_again(directory: RunDirectory, summary: bytes) -> None:
    """A complete run that this start was refused to change is complete as before."""
    if result.FINISHED in read_finished(directory.checkpoint):
        result.tidy(directory)
        replace_bytes(directory.summary, summary)


def _finished(job: Job, directory: RunDirectory, asked: Asked) -> Summary | None:
    """The summary of a run that is complete already, untouched; None where there is still something to do."""
    if not (directory.read_summary() or {}).get("complete"):
        return None
    summary = read(directory)
    manifest = read_finished(directory.checkpoint)
    known = facts.read(manifest)
    planning.require_same_shape(job, known)
    _, _, settings = variants.place(job, variants.read(manifest), known.variant, retrying=asked.retry is not None)
    what = planning.changed_input(reading.input_files(job, directory, asked), directory, known)
    wanted = known.rows if asked.limit is None else min(asked.limit, known.rows)
    again = asked.retry is not None and any(summary.by_status.get(status) for status in asked.retry)
    if settings or what is not None or again or wanted > summary.rows_in_output:
        return None
    result.require_there(directory, known.output.layout, summary.rows_in_output)
    return msgspec.structs.replace(summary, exit_code=int(_exit_code(job, summary)), files=files(directory))


def _unfinish(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint) -> None:
    """A finished pilot of the first rows is an open run again, if there are more rows to ask."""
    if result.FINISHED in checkpoint.manifest() and checkpoint.spent.settled() < plan.rows:
        chunks = result.restore_parts(plan.facts, checkpoint, checkpoint.chunks(), directory)
        checkpoint.reopen_chunks(chunks, (), {})


def _begin(plan: Plan, checkpoint: Checkpoint, chronicle: Chronicle) -> None:
    """The run is under way."""
    chronicle.plan = plan
    chronicle.state = "running"
    chronicle.log.write("started", invocation=checkpoint.invocation, resumed=plan.resumed, rows=plan.rows)
    chronicle.write(chronicle.summary())


def _retried(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, statuses: frozenset[str]) -> str:
    """Rows that ended with one of the statuses are pending again, unless rows are pending already; what to tell.

    Raises:
        JobError: rows are pending, and this start would ask them otherwise than was meant.
    """
    pending = plan.rows - checkpoint.spent.settled()
    manifest = variants.encode(plan.variants)
    if pending and checkpoint.manifest()[variants.ENTRY] != manifest[variants.ENTRY]:
        raise JobError(
            f"{plural(pending, 'row')} {are(pending)} still pending as asked before; finish the run, then retry"
        )
    if pending:
        return f"{plural(pending, 'row')} {are(pending)} still pending; asked first"
    mean_cost_usd = checkpoint.spent.mean_cost_usd()
    rows = retry.reopen(plan, directory, checkpoint, statuses, plan.variant, manifest)
    ended = f"{plural(rows, 'row')} that ended as {', '.join(sorted(statuses))}"
    return f"{ended} {are(rows)} asked again{about(rows, mean_cost_usd)}"


def _chunks(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint) -> Chunks:
    return Chunks(
        directory,
        checkpoint,
        plan.source,
        identities=plan.facts.files,
        rejected=frozenset(plan.facts.rejected),
        types=plan.types,
        schema=plan.schema,
        settings=plan.facts.output,
        parsed=plan.parsed,
        layout=plan.facts.layout,
        limit=plan.rows if plan.rows < plan.facts.rows else None,
    )


def _finish(
    job: Job, plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, chunks: Chunks, chronicle: Chronicle
) -> Summary:
    """The result is written; more failed rows than the job allows are told by the exit code."""
    if (unsettled := chunks.open_next()) is not None:
        raise CheckpointError(f"chunk {unsettled.chunk.chunk}: has pending rows that the totals count as settled")
    chronicle.state = "writing"
    result.write(plan.facts, plan.schema, checkpoint, chunks, directory, chronicle.summary())
    return chronicle.end("complete", _exit_code(job, chronicle.summary()), None)


def _exit_code(job: Job, summary: Summary) -> ExitCode:
    """The code of a complete run, by the failures that the job allows now."""
    failed = failures(summary, failing(job.finish))
    return ExitCode.TOO_MANY_FAILURES if failed > job.output.max_failures else ExitCode.COMPLETE
