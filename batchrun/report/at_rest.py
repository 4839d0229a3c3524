"""Where a run stands: as its last process said, or as the disk says where that process was killed."""

from datetime import UTC, datetime

import msgspec

from batchrun.errors import CheckpointError
from batchrun.prices import PriceTable
from batchrun.records import Summary
from batchrun.report.summary import Moment, read, summarise
from batchrun.store import at_rest, manifest
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.rundir import RunDirectory


class Standing(msgspec.Struct, frozen=True):
    """`alive`: a process works on the run. `died`: its last process was killed. Then `summary` says what is on disk;
    where `problem` says why the disk can't be read, it is what that process wrote last.
    """

    summary: Summary
    alive: bool = False
    died: bool = False
    problem: str | None = None


def standing(directory: RunDirectory) -> Standing:
    """Where the run stands now. No lock is held while the disk is read: a start is never refused because of a look.

    Raises: as `summary.read`.
    """
    written = read(directory)
    if written.exit_code is not None:
        return Standing(written)
    if directory.locked():
        return Standing(written, alive=True)
    written = read(directory)  # the process may have ended between the two looks
    if written.exit_code is not None:
        return Standing(written)
    found, problem = written, None
    try:
        with at_rest.opened(directory.checkpoint, directory.inflight, glance=True) as checkpoint:
            found = on_disk(directory, checkpoint, written)
    except CheckpointError as error:  # a DiskError, too
        problem = str(error)
    if directory.locked():  # a start came meanwhile and changed what was being read
        return Standing(read(directory), alive=True)
    return Standing(found, died=True, problem=problem)


def on_disk(directory: RunDirectory, checkpoint: Checkpoint, written: Summary | None) -> Summary:
    """The summary that the checkpoint gives. `written` is summary.json; it alone knows that a run is a pilot of the
    first rows, and how its last start ended.

    Raises:
        CheckpointError: a record is damaged.
    """
    entries = checkpoint.manifest()
    if manifest.ENTRY not in entries and written is not None:
        return written  # killed while the input was checked: nothing was sent
    known = manifest.read(entries)
    prices = msgspec.json.decode(entries.get("prices", "{}"), type=dict[str, PriceTable | None])
    rows = known.rows
    if written is not None and written.run_id == known.run_id:
        opened = max((chunk.end_row for chunk in checkpoint.chunks()), default=0)
        rows = min(known.rows, max(written.rows, opened))
    return summarise(known, rows, prices, checkpoint.spent, _moment(directory, checkpoint, written), directory)


def _moment(directory: RunDirectory, checkpoint: Checkpoint, written: Summary | None) -> Moment:
    """The last moment at which anything became durable."""
    log = at_rest.log_of(directory.checkpoint)
    files = [path for path in (directory.checkpoint, log) if path.exists()]
    now = datetime.fromtimestamp(max(path.stat().st_mtime for path in files), UTC)
    started_at = now if written is None else written.started_at
    return Moment(
        state="stopped" if written is None else written.state,
        invocation=checkpoint.invocation - 1,
        started_at=started_at,
        now=now,
        elapsed_s=max(0.0, (now - started_at).total_seconds()),
        sent=0,
        limited_by="stopped",
        pid=0 if written is None else written.pid,
        host="" if written is None else written.host,
        exit_code=None if written is None else written.exit_code,
        reason=None if written is None else written.reason,
        limits=None if written is None else written.limits,
        command=None if written is None else written.command,
        tags={} if written is None else written.tags,
    )
