"""The run on disk as one noun, and where what is in flight lands in it."""

import asyncio

import msgspec

from batchrun.dispatch.result_queue import ResultQueue
from batchrun.records import Completion, Ending, Status
from batchrun.startup.resume import Plan
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks, OpenChunk
from batchrun.store.in_flight import InFlightFile
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import DISCARDED, LOST


class Store(msgspec.Struct, frozen=True):
    """One run as this start has it: its directory, what is durable of it, what it is to do, and its chunks."""

    directory: RunDirectory
    checkpoint: Checkpoint
    plan: Plan
    chunks: Chunks

    @property
    def pending(self) -> int:
        """Rows without a completion."""
        return self.plan.rows - self.checkpoint.spent.settled()

    @property
    def was_answered(self) -> bool:
        """True where an earlier start got an answer from the endpoint."""
        failed = (Status.ERROR, DISCARDED, LOST)
        return any(line.rows > line.reused for line in self.checkpoint.spent.lines() if line.status not in failed)

    def attempt_id(self, row: int, n: int) -> str:
        """The name of an attempt, as it is sent in `endpoint.request_id_header`."""
        return f"{self.plan.facts.attempt_prefix}-{row}-{n}"


class Landing(msgspec.Struct, frozen=True):
    """Where attempts land: `slots` name them while they are out, `results` hands settled rows to a program that reads
    them, `full` holds the chunks whose last row is durable.
    """

    store: Store
    slots: InFlightFile
    results: ResultQueue | None
    full: "asyncio.Queue[OpenChunk | None]"

    def has_room(self) -> bool:
        """False while settled rows wait for the program to read them."""
        return self.results is None or self.results.room()

    def settled(self, ending: Ending, chunk: OpenChunk) -> None:
        """The row's last record is durable: it is handed over, and its chunk is full if it was the last."""
        if self.results is not None and isinstance(ending, Completion):
            self.results.put(ending, chunk)
        chunk.left -= 1
        if not chunk.left:
            self.full.put_nowait(chunk)
