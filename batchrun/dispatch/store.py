"""The run on disk, and what is open on it while requests are sent."""

import asyncio
from collections.abc import Callable, Iterable
from decimal import Decimal

import msgspec

from batchrun.dispatch.result_queue import ResultQueue
from batchrun.records import Answer, CompletionRecord, Ending, Status
from batchrun.startup.resume import Plan
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks
from batchrun.store.in_flight import InFlightFile
from batchrun.store.open_chunk import OpenChunk
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import DISCARDED, LOST


class Store(msgspec.Struct, frozen=True):
    """One run in this start: its directory, its durable records, the plan, and its chunks.

    `canary`: the only rows to send for now. `before_usd` is the most that the run had cost before this start. `opened`
    gets the number, first row and rows of each chunk that is opened.
    """

    directory: RunDirectory
    checkpoint: Checkpoint
    plan: Plan
    chunks: Chunks
    canary: "CanaryRows | None" = None
    before_usd: Decimal = Decimal(0)
    opened: Callable[[int, int, int], None] | None = None

    def open_next(self) -> OpenChunk | None:
        """The next chunk with rows to send; None when there is no more."""
        chunk = self.chunks.open_next() if self.canary is None else self.canary.open_next(self.chunks)
        if chunk is not None and self.opened is not None:
            self.opened(chunk.chunk.chunk, chunk.chunk.first_row, chunk.chunk.rows)
        return chunk

    @property
    def pending(self) -> int:
        """Rows without a completion."""
        return self.plan.rows - self.checkpoint.totals.settled()

    @property
    def was_answered(self) -> bool:
        """True if an earlier start received an answer from the endpoint."""
        failed = (Status.ERROR, DISCARDED, LOST)
        return any(line.rows > line.reused for line in self.checkpoint.totals.lines() if line.status not in failed)


class CanaryRows:
    """The rows of a canary, chunk by chunk. Chunks behind the last of them are not opened."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._left = sorted(rows)

    def open_next(self, chunks: Chunks) -> OpenChunk | None:
        """The next chunk with such rows to send; None when there is no more."""
        while self._left and (chunk := chunks.open_next(keep_settled=True)) is not None:
            here = {row for row in self._left if row < chunk.chunk.end_row}
            self._left = [row for row in self._left if row not in here]
            if chunk.limit_to(here):
                return chunk
        return None


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

    def settled(self, ending: Ending, chunk: OpenChunk, answer: Answer) -> None:
        """The row's completion is durable: it goes to the reader, and its chunk to the sealer after the last row.

        `answer` is what its last attempt brought.
        """
        if isinstance(ending, CompletionRecord) and ending.error is None and not ending.set_aside:
            # no errors: an earlier answer may have been restored, and their texts are stored with characters replaced
            chunk.kept.add(ending, answer)
        if self.results is not None and isinstance(ending, CompletionRecord):
            self.results.put(ending, chunk)
        chunk.left -= 1
        if not chunk.left and self.store.canary is None:  # the canary is judged by records in the database
            self.full.put_nowait(chunk)
