"""Writes a damaged result again, where a run keeps its parts beside it: partitions and JSON lines."""

import contextlib

from batchrun.errors import InputError
from batchrun.report.summary import read
from batchrun.report.wording import plural
from batchrun.store import result
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


def rebuild(directory: RunDirectory) -> str:
    """Restores the result as it was first written and returns a line about it. Sends nothing.

    Raises:
        InputError: the run is not complete.
        RunLockedError: a process works on the run.
        CheckpointError: the run keeps no parts, or they are damaged; the result stays as it is.
        DiskError: it can't be written.
    """
    with directory.lock():
        summary = read(directory)
        if not summary.complete:
            raise InputError(f"{directory.path}: the run is not complete, so it has no result to write again")
        checkpoint = Checkpoint(directory.checkpoint, free_reserve=lambda: False)
        with contextlib.closing(checkpoint):
            manifest = Manifest.decode(checkpoint.manifest_entries())
            written = result.rewrite(manifest, checkpoint, directory, summary)
            checkpoint.close(finished=True)
    place = written.folder or written.files[0].name
    return f"rebuilt  {place}: {plural(summary.rows, 'row')} from {plural(len(written.kept), 'part')}"
