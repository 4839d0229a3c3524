"""The report of another start on a complete run, and the exit code of a complete run."""

import msgspec

from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.report.summary import failures, files, read
from batchrun.row_status import failing
from batchrun.run_summary import Summary
from batchrun.startup import adopt, input_pass, shard
from batchrun.startup.resume import require_same_shape
from batchrun.startup.run_options import RunOptions
from batchrun.store import result, variants
from batchrun.store.checkpoint import read_finished
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


def summary_of(job: Job, directory: RunDirectory, options: RunOptions) -> Summary | None:
    """The summary of a run that is complete already; None if there is something left to do."""
    directory.given.unlink(missing_ok=True)  # of a start that was killed
    if not (directory.read_summary() or {}).get("complete"):
        return None
    summary = read(directory)
    entries = read_finished(directory.checkpoint)
    known = Manifest.decode(entries)
    shard.require_same(options.shard, known, directory.path)
    require_same_shape(job, known)
    retrying = options.retry is not None
    placed = variants.place(job, variants.decode(entries), known.variant, retrying=retrying)
    changed_input = adopt.changed_input(input_pass.input_files(job, directory, options), directory, known)
    wanted_rows = known.rows if options.limit is None else min(options.limit, known.rows)
    to_retry = any(summary.by_status.get(status) for status in options.retry or ())
    if placed.changed or changed_input is not None or to_retry or wanted_rows > summary.rows_in_output:
        return None
    result.require_intact(directory, summary.rows_in_output, entries)
    return msgspec.structs.replace(summary, exit_code=int(exit_code(job, summary)), files=files(directory))


def exit_code(job: Job, summary: Summary) -> ExitCode:
    """The exit code of a complete run, by the number of failures that the job allows now."""
    failed = failures(summary, failing(job.finish))
    return ExitCode.TOO_MANY_FAILURES if failed > job.output.max_failures else ExitCode.COMPLETE
