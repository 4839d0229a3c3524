"""The run on disk, and what is open on it while requests are sent."""

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
    """One run in this start: its directory, its durable records, the plan, and its chunks."""

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
        """True if an earlier start received an answer from the endpoint."""
        failed = (Status.ERROR, DISCARDED, LOST)
        return any(line.rows > line.reused for line in self.checkpoint.spent.lines() if line.status not in failed)

    def attempt_id(self, row: int, n: int) -> str:
        """The id of an attempt, as sent in `endpoint.request_id_header`."""
        return f"{self.plan.facts.attempt_prefix}-{row}-{n}"


class OpenRun(msgspec.Struct, frozen=True):
    """The store, and what is open on it while requests are sent.

    `slots` names the requests in flight, `results` passes settled rows to a program that reads them, `full` queues the
    chunks whose last row is durable.
    """

    store: Store
    slots: InFlightFile
    results: ResultQueue | None
    full: "asyncio.Queue[OpenChunk | None]"

    def has_room(self) -> bool:
        """False while too many settled rows wait for the program to read them."""
        return self.results is None or self.results.has_room()

    def settled(self, ending: Ending, chunk: OpenChunk) -> None:
        """The row's completion is durable: it goes to the reader, and its chunk to the sealer after the last row."""
        if self.results is not None and isinstance(ending, Completion):
            self.results.put(ending, chunk)
        chunk.left -= 1
        if not chunk.left:
            self.full.put_nowait(chunk)
