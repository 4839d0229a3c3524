"""Settled rows on their way from the thread that asks to who reads them: bounded, so a slow reader slows the run."""

import threading
from collections.abc import Callable, Sequence

import msgspec
import pyarrow as pa

from batchrun.records import Completion as Record
from batchrun.response import packed
from batchrun.store.chunks import OpenChunk
from batchrun.tables import completions
from batchrun.tables.completions import Completion

MAX_ROWS = 256
"""Unread rows that stop the handing out of new ones: enough for a reader that looks up now and then."""

MAX_BYTES = 64_000_000
"""The same in bytes of their answers, unpacked, which may be large."""


RowsOf = Callable[[Sequence[Record], Sequence[pa.RecordBatch]], pa.RecordBatch]


class Settled(msgspec.Struct, frozen=True):
    """A row whose completion is durable, and its input as a batch of one row."""

    record: Record
    input: pa.RecordBatch


class ResultQueue:
    """Between two threads. The asking thread puts; the reader takes all that there is, or gives up reading."""

    def __init__(self, on_news: Callable[[], None], max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        """`on_news` is called, in the asking thread, when there is something to take after there was nothing."""
        self._on_news = on_news
        self._on_room: Callable[[], None] = lambda: None
        self._rows_of: RowsOf | None = None
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._unread: list[Settled | Completion] = []
        self._bytes = 0
        self._given_up = False

    # ── the thread that asks ──────────────────────────────────────────────────────────────────────────────────────────

    def listen(self, on_room: Callable[[], None], rows_of: RowsOf) -> None:
        """From now on `on_room` is called, in the reader's thread, when there is room after there was none; there,
        too, `rows_of` makes rows of the output of what was put.
        """
        self._on_room, self._rows_of = on_room, rows_of

    def room(self) -> bool:
        """True while another row may be asked."""
        return self._given_up or (len(self._unread) < self._max_rows and self._bytes < self._max_bytes)

    def put(self, record: Record, chunk: OpenChunk) -> None:
        """The row, just settled, is there to take."""
        if not self._given_up:
            self._put(Settled(record, chunk.window.slice(record.row)), packed.size(record.raw))

    def put_earlier(self, completion: Completion) -> bool:
        """The row, settled by an earlier start, is there to take; waits for room. False: nobody will take it."""
        with self._changed:
            self._changed.wait_for(self.room)
        if not self._given_up:
            self._put(completion, len(completion.content or ""))
        return not self._given_up

    def _put(self, item: Settled | Completion, size_bytes: int) -> None:
        with self._changed:
            first = not self._unread
            self._unread.append(item)
            self._bytes += size_bytes
        if first:
            self._on_news()

    # ── the reader ────────────────────────────────────────────────────────────────────────────────────────────────────

    def take(self) -> list[Completion]:
        """Everything that is there, in the order in which it was put; it is nobody else's any more."""
        with self._changed:
            full = not self.room()
            taken, self._unread, self._bytes = self._unread, [], 0
            self._changed.notify_all()
        if full:
            self._on_room()
        earlier = [item for item in taken if isinstance(item, Completion)]
        settled = [item for item in taken if isinstance(item, Settled)]
        if not settled or self._rows_of is None:
            return earlier
        rows = self._rows_of([item.record for item in settled], [item.input for item in settled])
        return [*earlier, *completions.read(rows)]

    def give_up(self) -> None:
        """Nothing more is handed over: the run goes on, or ends, as if nobody had read."""
        with self._changed:
            self._given_up = True
            self._unread, self._bytes = [], 0
            self._changed.notify_all()
        self._on_room()
