"""Accepted amounts, in total and per second. PURE."""

from collections import deque

WINDOW_S = 10.0
GRAIN_S = 0.05
LEAST_SPAN_S = 1.0
"""Over less than a second, one request more or less distorts the rate."""

HISTORY_S = 30.0
HISTORY_GRAIN_S = 0.5
SUSTAINED_S = 5.0
"""A rate sustained for five seconds is more than a burst: a bucket that holds two seconds of its limit looks 1.4 times
as fast over that time, and the excess of refusals that follows corrects it."""


class Throughput:
    """Amounts (requests or tokens) that the server accepted, in the order of sending. Rates are per second."""

    __slots__ = ("_history", "_lately", "first_s", "total")

    def __init__(self) -> None:
        self.total = 0.0
        self.first_s: float | None = None
        self._lately: deque[tuple[float, float]] = deque()
        self._history: deque[tuple[float, float]] = deque()

    def add(self, at_s: float, amount: float) -> None:
        """Adds an amount that was sent at `at_s` and accepted."""
        self.total += amount
        lately, history = self._lately, self._history
        if not lately or at_s - lately[-1][0] >= GRAIN_S:
            lately.append((at_s, self.total))
            if self.first_s is None:
                self.first_s = at_s
            if not history or at_s - history[-1][0] >= HISTORY_GRAIN_S:
                history.append((at_s, self.total))
        while at_s - lately[0][0] > WINDOW_S:
            lately.popleft()
        while at_s - history[0][0] > HISTORY_S:
            history.popleft()

    def span_s(self, at_s: float) -> float:
        """How long ago the first amount was added."""
        return 0.0 if self.first_s is None else at_s - self.first_s

    def lately(self, at_s: float) -> float | None:
        """The rate of the last ten seconds; None over less than one."""
        if not self._lately or at_s - self._lately[0][0] < LEAST_SPAN_S:
            return None
        first_s, first = self._lately[0]
        return (self.total - first) / (at_s - first_s)

    def in_last_second(self, at_s: float) -> float:
        """The amount accepted in the last second."""
        before = [total for moment_s, total in self._lately if at_s - moment_s > LEAST_SPAN_S]
        return self.total - (before[-1] if before else 0.0)

    def sustained(self) -> float:
        """The highest rate over five seconds of the last thirty; 0.0 before there were five."""
        best, moments = 0.0, list(self._history)
        start = 0
        for at_s, total in moments:
            while start + 1 < len(moments) and at_s - moments[start + 1][0] >= SUSTAINED_S:
                start += 1
            if (span_s := at_s - moments[start][0]) >= SUSTAINED_S:
                best = max(best, (total - moments[start][1]) / span_s)
        return best
