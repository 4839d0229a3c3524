"""Tells an outage from failures by chance. PURE."""

OUTAGE_ROWS = 5
MANY_OUTAGE_ROWS = 8
"""This many different rows in a row without an answer are an outage: with 30 % random failures, five are one chance in
400, and a false alarm costs a second. With many in flight, eight: one chance in 15,000, and few enough that a
ten-minute outage sees fewer than thirty requests, probes included."""

STILL_OUT = 3
"""Nearly all: three have failed for each still in flight. With 30 % random failures it is the other way round."""


class Unanswered:
    """Attempts without an answer: their rows, and how many were sent since the first.

    If failures are fast and answers slow, answers to older requests arrive between failures. They end the series of
    failed rows, but not the count of attempts sent since the first failure.
    """

    __slots__ = ("_attempts", "_in_a_row", "_rows", "_since")

    def __init__(self) -> None:
        self._in_a_row: set[int] = set()
        self.forget()

    def forget(self) -> None:
        """Starts a new episode."""
        self._since: int | None = None
        self._attempts = 0
        self._rows: set[int] = set()

    def answer(self, order: int) -> None:
        """The attempt of this order was answered."""
        self._in_a_row.clear()
        if self._since is not None and order > self._since:
            self.forget()

    def fail(self, row: int, order: int, *, sent: int, allowed_in_flight: int) -> bool:
        """Counts one more attempt without an answer, of `sent` in all; True if that makes an outage."""
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
