"""The options of a start beyond the job, and its directory with the open checkpoint."""

from collections.abc import Callable
from typing import BinaryIO, Literal

import msgspec

from batchrun.job.job import Job
from batchrun.limits.deadline import Deadline
from batchrun.run_summary import Shard
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


class RunOptions(msgspec.Struct, frozen=True):
    """The options of one start. `stdin` is read if the input is "-". `read_only` refuses every change of the run.

    `accept_changes`: True accepts a changed input or job, "input" a changed input only. `limit`: a pilot over the first
    rows, which a later start without it completes. `retry`: the statuses whose rows are sent again once every row is
    settled; None: no retry. `shard`: the part of the input that this run is over; None: all of it. `problem` gets a
    line for each kind of invalid record, `note` other lines for the user.
    """

    skip_invalid: bool = False
    accept_changes: bool | Literal["input"] = False
    accept_canary: bool = False
    read_only: bool = False
    limit: int | None = None
    deadline: Deadline | None = None
    retry: frozenset[str] | None = None
    shard: Shard | None = None
    stdin: BinaryIO | None = None
    problem: Callable[[str], None] = lambda line: None
    note: Callable[[str], None] = lambda line: None
    checked: Callable[[int], None] = lambda rows: None


class Start(msgspec.Struct, frozen=True):
    """One start of a run: its job, and the directory with its open checkpoint."""

    job: Job
    directory: RunDirectory
    checkpoint: Checkpoint
    options: RunOptions

    def opened_rows(self, known: Manifest) -> int:
        """The rows of chunks that were opened."""
        chunks = self.checkpoint.chunks()
        return chunks[-1].end_row - known.first_row if chunks else 0
