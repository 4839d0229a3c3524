"""The bounded queue of settled rows between the event loop's thread and a reader: a slow reader slows the run."""

import threading
from collections.abc import Callable, Iterable, Sequence

import msgspec

from batchrun.records import CompletionRecord
from batchrun.response import packed
from batchrun.store.open_chunk import OpenChunk
from batchrun.store.stored_window import StoredBatch
from batchrun.tables.rows import Completion

MAX_ROWS = 256
"""With so many unread rows no new row is sent: enough for a reader that is slow now and then."""

MAX_BYTES = 64_000_000
"""The same limit in bytes of the rows' answers, unpacked."""

CompletionsOf = Callable[[Sequence[CompletionRecord], Sequence[tuple[StoredBatch, int]]], Iterable[Completion]]


class Settled(msgspec.Struct, frozen=True):
    """A row whose completion is durable, and where its input is stored."""

    record: CompletionRecord
    input: tuple[StoredBatch, int]


class ResultQueue:
    """The sending thread puts rows; the reader takes all that are there, or stops reading."""

    def __init__(self, on_rows: Callable[[], None], max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> None:
        """`on_rows` is called in the sending thread after a row was put into the empty queue."""
        self._on_rows = on_rows
        self._call_soon: Callable[[Callable[[], None]], object] = lambda call: call()
        self._on_room: Callable[[], None] = lambda: None
        self._completions_of: CompletionsOf | None = None
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._unread: list[Settled | Completion] = []
        self._bytes = 0
        self._stopped_reading = False

    # ── the sending thread ────────────────────────────────────────────────────────────────────────────────────────────

    def listen(
        self,
        on_room: Callable[[], None],
        completions_of: CompletionsOf,
        call_soon: Callable[[Callable[[], None]], object],
    ) -> None:
        """From now on `on_room` is called when the queue has room again, and `completions_of` reads what was put:
        both in the reader's thread. `call_soon` is the sending event loop's.
        """
        # By the loop, so that the reader is woken once a commit, when all rows of it are there: a row alone costs the
        # reader ten times as much as one of many.
        self._on_room, self._completions_of, self._call_soon = on_room, completions_of, call_soon

    def has_room(self) -> bool:
        """True while another row may be sent."""
        return self._stopped_reading or (len(self._unread) < self._max_rows and self._bytes < self._max_bytes)

    def put(self, record: CompletionRecord, chunk: OpenChunk) -> None:
        """The row, settled just now, is in the queue."""
        if not self._stopped_reading:
            self._put(Settled(record, chunk.window.stored(record.row)), packed.size(record.raw))

    def put_earlier(self, completion: Completion) -> bool:
        """The row, settled by an earlier start, is in the queue; waits for room. False: the reader has stopped."""
        with self._changed:
            self._changed.wait_for(self.has_room)
        if not self._stopped_reading:
            self._put(completion, len(completion.content or ""))
        return not self._stopped_reading

    def _put(self, item: Settled | Completion, size_bytes: int) -> None:
        with self._changed:
            was_empty = not self._unread
            self._unread.append(item)
            self._bytes += size_bytes
        if was_empty:
            self._call_soon(self._on_rows)

    # ── the reader ────────────────────────────────────────────────────────────────────────────────────────────────────

    def pop_all(self) -> list[Completion]:
        """Every row in the queue, in the order in which it was put; the queue is empty afterwards."""
        if not self._unread:
            return []
        with self._changed:
            was_full = not self.has_room()
            taken, self._unread, self._bytes = self._unread, [], 0
            self._changed.notify_all()
        if was_full:
            self._on_room()
        earlier = [item for item in taken if isinstance(item, Completion)]
        settled = [item for item in taken if isinstance(item, Settled)]
        if not settled or self._completions_of is None:
            return earlier
        now = self._completions_of([item.record for item in settled], [item.input for item in settled])
        return [*earlier, *now]

    def stop_reading(self) -> None:
        """The queue drops every row from now on; the run continues as if it had no reader."""
        with self._changed:
            self._stopped_reading = True
            self._unread, self._bytes = [], 0
            self._changed.notify_all()
        self._on_room()
