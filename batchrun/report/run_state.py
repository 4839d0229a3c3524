"""The state of a run: as its last process wrote it, or, if that process was killed, as the disk shows it."""

from datetime import UTC, datetime
from typing import Any

import msgspec

from batchrun.errors import CheckpointError
from batchrun.report.summary import Moment, read, summarise
from batchrun.run_summary import Summary
from batchrun.store import at_rest, price_tables
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


class RunState(msgspec.Struct, frozen=True):
    """`working`: a process works on the run. `died`: its last process was killed, and `summary` is computed from the
    checkpoint; if that can't be read, `problem` says why and `summary` is the last one that was written.
    """

    summary: Summary
    working: bool = False
    died: bool = False
    problem: str | None = None


def run_state(directory: RunDirectory) -> RunState:
    """The state of the run now. Reading takes no lock, so it never blocks a start.

    Raises: as `summary.read`.
    """
    written = read(directory)
    if written.exit_code is not None:
        return RunState(written)
    if directory.locked():
        return RunState(written, working=True)
    written = read(directory)  # the process may have ended after the first read
    if written.exit_code is not None:
        return RunState(written)
    found, problem = written, None
    try:
        with at_rest.opened(directory.checkpoint, directory.inflight, quick=True) as checkpoint:
            found = from_checkpoint(directory, checkpoint, written)
    except CheckpointError as error:  # DiskError is one, too
        problem = str(error)
    if directory.locked():  # a start changed the checkpoint while it was read
        return RunState(read(directory), working=True)
    return RunState(found, died=True, problem=problem)


def from_checkpoint(directory: RunDirectory, checkpoint: Checkpoint, written: Summary | None) -> Summary:
    """The summary that the checkpoint gives.

    `written` is summary.json. Only it knows that a run is a pilot of the first rows, and how its last start ended.

    Raises:
        CheckpointError: a record is damaged.
    """
    entries = checkpoint.manifest_entries()
    if Manifest.ENTRY not in entries and written is not None:
        return written  # killed while the input was checked: nothing was sent
    known = Manifest.decode(entries)
    prices = price_tables.decode(entries)
    rows = known.rows
    if written is not None and written.run_id == known.run_id:
        opened = max((chunk.end_row - known.first_row for chunk in checkpoint.chunks()), default=0)
        rows = min(known.rows, max(written.rows, opened))
    # its moment is the last one at which anything became durable
    files = [path for path in (directory.checkpoint, at_rest.wal_of(directory.checkpoint)) if path.exists()]
    now = datetime.fromtimestamp(max(path.stat().st_mtime for path in files), UTC)
    kept: dict[str, Any] = {"state": "stopped", "started_at": now, "pid": 0, "host": ""}
    if written is not None:
        names = (*kept, "exit_code", "reason", "limits", "command", "tags")
        kept = {name: getattr(written, name) for name in names}
    elapsed_s = max(0.0, (now - kept["started_at"]).total_seconds())
    invocation = checkpoint.invocation - 1
    moment = Moment(invocation=invocation, now=now, elapsed_s=elapsed_s, sent=0, limited_by="stopped", **kept)
    return summarise(known, rows, prices, checkpoint.totals, moment, directory)
