"""Which kind of row is sent next after several new rows have failed one after another. PURE.

Then no one knows whether these rows are bad or the endpoint is down, so the backlog **mixes**: it hands out, in turn, a
retry, a new row from further ahead, and the next new row. A retry succeeds if every row fails at first, a row from
further ahead if only the next thousand are bad, none if the endpoint is down.
"""

from collections.abc import Iterator
from enum import Enum

from batchrun.records import OK, Verdict

FAILED_FIRST = 3
"""After so many new rows have failed one after another at their first attempt, the backlog mixes."""

MOST_DOUBTED = 8
"""While the backlog mixes and one kind of row is answered, so many rows of the other kinds may be in flight or have
failed since the last answer: enough to notice a change, and few requests if an outage begins."""

FIRST_REACH, MOST_REACH = 1_000, 16_000
"""How many rows ahead the backlog looks: four times as far after each row ahead that fails, bounded by memory and
disk."""

PLACES = (1.0, 0.5, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125)
"""Where in that reach a row is taken: the last one first, since bad rows are often neighbours. The place stays the same
while its rows are answered."""


class Kind(Enum):
    """Where the backlog took a row from while it mixes."""

    RETRY = 0
    AHEAD = 1
    NEXT = 2


class Mixing:
    """What the ends of attempts say about each kind of row."""

    def __init__(self) -> None:
        self.is_on = False  # whether rows are handed out by kind
        self.reach = FIRST_REACH  # how many rows ahead may be taken
        self.answered: Kind | None = None  # the kind that was answered last, until it fails
        self._doubted = 0  # rows of the other kinds that are busy, or have failed since the last answer
        self._kinds: dict[int, Kind] = {}  # of busy rows that were taken while the backlog mixed
        self._failed_first = 0  # new rows, taken in order, that failed one after another
        self._last_failed = -1  # the last row, of those taken in order, whose first attempt failed
        self._place = 0
        self._turn = 0

    def index(self, rows: int) -> int:
        """Which of so many rows ahead is taken."""
        return int(PLACES[self._place % len(PLACES)] * (rows - 1))

    def kinds(self, *, may_wait: bool) -> Iterator[Kind]:
        """The kinds to try, in order: in turn until one of them is answered, then this one, with a few rows of the
        others between two answers. `may_wait`: if it has no row now, waiting for one is better than another kind.
        """
        if self.answered is not None:
            if self._doubted < MOST_DOUBTED:
                yield from (kind for kind in self._in_turn() if kind is not self.answered)
            yield self.answered
        if self.answered is None or not may_wait:
            yield from self._in_turn()

    def taken(self, row: int, kind: Kind) -> None:
        """The row was handed out as one of this kind."""
        self._kinds[row] = kind
        self._doubted += self.answered not in (None, kind)

    def put_back(self, row: int) -> None:
        """The row was not sent."""
        if self._kinds.pop(row, self.answered) is not self.answered:
            self._doubted = max(0, self._doubted - 1)

    def is_doubted(self, row: int) -> bool:
        """True for a busy row of another kind than the one that is answered."""
        return self.answered not in (None, self._kinds.get(row, self.answered))

    def ended(self, row: int, verdict: Verdict, *, is_new: bool) -> bool:
        """An attempt of the row has ended; `is_new`: its first one. True if another kind may be sent now."""
        if verdict is OK and not self._kinds:  # nearly all attempts
            self._doubted = 0
            if is_new and row > self._last_failed:
                self._search_again()
            return False
        kind = self._kinds.pop(row, None)
        if verdict is OK or verdict is Verdict.ROW:
            self.answered = kind or self.answered
            self._doubted = sum(each is not self.answered for each in self._kinds.values())
            if is_new and row > self._last_failed and kind is not Kind.AHEAD:
                self._search_again()
        elif verdict in (Verdict.FREE, Verdict.MAYBE, Verdict.SLOW):
            if kind is self.answered:
                self.answered, self._doubted = None, 0
            if kind is Kind.AHEAD:
                self._place += 1
                self.reach = min(MOST_REACH, 4 * self.reach)
            elif is_new:
                self._failed_first += 1
                self.is_on = self._failed_first >= FAILED_FIRST
                self._last_failed = max(self._last_failed, row)
        return True

    def _search_again(self) -> None:
        """The next new row was answered, so rows come in order until several of them fail again."""
        self._failed_first = self._place = 0
        self.is_on, self.reach = False, FIRST_REACH

    def _in_turn(self) -> Iterator[Kind]:
        for _ in Kind:
            self._turn += 1
            yield Kind((self._turn - 1) % len(Kind))
