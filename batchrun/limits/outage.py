"""When failures are an outage, and not chance. PURE."""

OUTAGE_ROWS = 5
MANY_OUTAGE_ROWS = 8
"""So many different rows without an answer, and none with one between, are an outage: with 30 % random failures five
in a row are one chance in 400, and a false alarm costs a second. Where many are in flight, eight: one chance in 15,000,
and still so few that ten minutes of an outage see fewer than thirty requests, with those that probe."""

STILL_OUT = 3
"""Nearly all: for each that is still out, three have failed. With 30 % random failures it is the other way about."""


class Unanswered:
    """Attempts without an answer: which rows they were for, and how many of those sent since the first.

    Where failures come at once and answers take their time, answers to older requests go on coming between them. They
    end the row of failures, but not the count of what was sent since.
    """

    __slots__ = ("_attempts", "_in_a_row", "_rows", "_since")

    def __init__(self) -> None:
        self._in_a_row: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """What was sent before this is of another episode."""
        self._since: int | None = None
        self._attempts = 0
        self._rows: set[int] = set()

    def answer(self, order: int) -> None:
        """The attempt of this order was answered."""
        self._in_a_row.clear()
        if self._since is not None and order > self._since:
            self.forget()

    def fail(self, row: int, order: int, *, sent: int, allowed_in_flight: int) -> bool:
        """One more had no answer, of `sent` in all; True when that makes it an outage."""
        if self._since is None:
            self._since = order
        self._rows.add(row)
        self._attempts += order >= self._since
        self._in_a_row.add(row)
        many = min(MANY_OUTAGE_ROWS, max(OUTAGE_ROWS, allowed_in_flight // 2))
        if len(self._in_a_row) >= many:
            return True
        still_out = sent - self._since - self._attempts
        return len(self._rows) >= many and STILL_OUT * still_out <= self._attempts
