"""Previews a start in a run directory: nothing is sent, and no answer is kept or dropped."""

import contextlib
from datetime import UTC, datetime

import msgspec

from batchrun.job.job import Job
from batchrun.report import summary as summaries
from batchrun.run_summary import Shard, Summary
from batchrun.startup import resume
from batchrun.startup.adopt import ChangedError
from batchrun.startup.changes import Changes
from batchrun.startup.run_options import RunOptions
from batchrun.store import result
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.rundir import RunDirectory


class Preview(msgspec.Struct, frozen=True):
    """The run's last summary, how many rows a start with this job would send, and what has changed since."""

    summary: Summary
    to_send: int
    changes: Changes | None


def preview_of(job: Job, directory: RunDirectory, shard: Shard | None = None) -> Preview:
    """The run that a start with this job would resume.

    Raises:
        InputError: there is no run.
        RunLockedError: a run works there; `batchrun status` shows how far it is.
    """
    summary = summaries.read(directory)
    with (
        directory.lock(),
        contextlib.closing(Checkpoint(directory.checkpoint, free_reserve=lambda: False)) as checkpoint,
    ):
        entries = checkpoint.manifest_entries()
        try:
            options = RunOptions(read_only=True, shard=shard)
            plan = resume.plan_start(job, directory, checkpoint, options, datetime.now(UTC))
            to_send = plan.manifest.rows - checkpoint.totals.settled()
            if (made := plan.origins) is not None:
                to_send -= max(0, made.reused + made.duplicates - summary.reused)
            return Preview(summary, to_send, None)
        except ChangedError as changed:
            return Preview(summary, changed.changes.to_send, changed.changes)
        finally:
            if result.FINISHED in entries:
                result.tidy(directory, result.finished(entries))  # the parts that a comparison cut from the result
