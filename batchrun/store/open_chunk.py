"""A chunk whose rows are sent: which of them are settled, and which are still to be sent."""

from collections.abc import Collection, Iterable, Iterator

import msgspec

from batchrun.records import Answer, CompletionRecord, Discarded, Row
from batchrun.store.carry_over import Taken
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.stored_window import StoredWindow

TO_SEND, SETTLED, CARRIED = range(3)
"""The state of a row when its chunk is opened."""

OVERHEAD_BYTES = 1200
"""What the objects of a kept row take, besides its texts (measured)."""


class Earlier(msgspec.Struct, frozen=True):
    """What earlier starts did with a chunk's rows: those that are `settled`, and by row the `discarded` attempts, the
    number of the last attempt that was `lost`, and the `reopened` ones. `copied_again`: their original is sent again.
    """

    settled: set[int] = set()
    discarded: dict[int, list[Discarded]] = {}
    lost: dict[int, int] = {}
    reopened: dict[int, Reopened] = {}
    copied_again: dict[int, Taken] = {}


class Kept:
    """Answers of a chunk that stay in memory until it is sealed, as far as they fit into so many bytes.

    They are durable already: this only saves reading them from the database and parsing them a second time.
    """

    def __init__(self, room_bytes: int) -> None:
        self._room_bytes = room_bytes
        # two, because the garbage collector would have to visit a tuple for each row
        self._records: dict[int, CompletionRecord] = {}
        self._answers: dict[int, Answer] = {}

    def add(self, record: CompletionRecord, answer: Answer) -> None:
        """Keeps the row's record with the content of its `raw`, if there is room."""
        size_bytes = len(record.raw) + len(answer.content or "") + OVERHEAD_BYTES
        if size_bytes <= self._room_bytes:
            self._room_bytes -= size_bytes
            self._records[record.row], self._answers[record.row] = record, answer

    def all_of(self, first_row: int, end_row: int) -> tuple[list[CompletionRecord], list[Answer]] | None:
        """The rows `first_row` to `end_row` - 1 in order; None if one of them is missing."""
        rows = range(first_row, end_row)
        if not self._records.keys() >= set(rows):
            return None
        return [self._records[row] for row in rows], [self._answers[row] for row in rows]

    def clear(self) -> None:
        """Frees the memory. Nothing can be added any more."""
        self._room_bytes = 0
        self._records.clear()
        self._answers.clear()


class OpenChunk:
    """A chunk whose rows are sent. `left` counts those still to be sent; `is_new`: no row of it was sent before."""

    def __init__(
        self,
        chunk: Chunk,
        window: StoredWindow,
        carried: Iterable[int] = (),
        earlier: Earlier | None = None,
        *,
        room_bytes: int = 0,
    ) -> None:
        """Rows that are `carried` take their answer without a request when the chunk is sealed; so do those that are
        copied again. `room_bytes`: how much memory its settled rows may take.
        """
        self.chunk = chunk
        self.window = window
        self.earlier = earlier = earlier or Earlier()
        self.waits_for: set[int] | None = None  # originals in earlier chunks that are not settled; None: not known yet
        self._state = bytearray(chunk.rows)  # a byte a row: many chunks may wait for one row that is retried for long
        for row in earlier.settled:
            self._state[row - chunk.first_row] = SETTLED
        for row in (*carried, *earlier.copied_again):
            self._state[row - chunk.first_row] = CARRIED
        self.left = self._state.count(TO_SEND)
        self.has_carried = CARRIED in self._state
        self.is_new = not (earlier.discarded or earlier.lost or earlier.reopened)
        self.kept = Kept(room_bytes)
        self._only: list[int] | None = None

    def to_send(self) -> Iterator[int]:
        """The rows still to be sent, by their numbers."""
        return (row for row, state in enumerate(self._state, self.chunk.first_row) if state == TO_SEND)

    def limit_to(self, only: Collection[int]) -> bool:
        """From now on `rows` gives only those of `only` that are still to be sent; False if there are none."""
        self._only = [row for row in self.to_send() if row in only]
        return bool(self._only)

    def rows(self) -> Iterator[list[Row]]:
        """The rows to send, in order, up to 1,000 at a time."""
        if self._only is not None:
            yield [self.window.row(row) for row in self._only]
        elif self.left:
            yield from self.window.rows(self._state)

    def is_carried(self, row: int) -> bool:
        """True if the row takes its answer without a request."""
        return self._state[row - self.chunk.first_row] == CARRIED
