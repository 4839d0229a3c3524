"""Finds the knee of the throughput curve: the fewest requests in flight that deliver as much. PURE.

For servers that never refuse but queue. If answers get slower with more in flight, they may wait for each other, or
just be longer. So fewer are tried. If three quarters of the number deliver as much, requests were queueing, and the
lower number stays. If answers take as long as before, there was no queue; one round shows that.
"""

from collections.abc import Callable

SLOWER = 1.5
"""The suspicious factor over the fastest round's latency: more than evenly spread answer lengths explain."""

FEWER = 0.75
AS_MUCH = 0.92
"""Halfway between what three quarters deliver without a queue (75 %) and with one (100 %), and a little more, because a
rate over some sixty answers has an error of a few percent."""

AS_SLOW = 0.9
"""In a shorter queue, three quarters of the requests wait three quarters of the time."""

LEAST_ROUND = 20
LEAST_COMPARED = 60
LEAST_IN_FLIGHT = 4
"""With fewer there is nothing to gain."""

AGAIN_S = 5.0
MAX_AGAIN_S = 120.0
"""When a suspicion may be tried again: after 5 s, or after 5, 10, 20 … 120 s if it was wrong."""


class UsefulInFlight:
    """Rounds of answers, and the cap that they led to; None while there is none.

    A round is as many answers as may be in flight. After a change of the number, answers to requests that were sent
    before it are skipped.
    """

    __slots__ = (
        "_again_s",
        "_before",
        "_compared",
        "_fastest_s",
        "_latencies",
        "_next_s",
        "_on_change",
        "_settling",
        "_slow_s",
        "_started_s",
        "cap",
    )

    def __init__(self, on_change: Callable[[str], None]) -> None:
        """`on_change` is called after each change of the cap, with its reason."""
        self._on_change = on_change
        self.cap: int | None = None
        self._fastest_s: float | None = None
        self._latencies: list[float] = []
        self._started_s: float | None = None
        self._compared: int | None = None  # the number in flight that is being measured
        self._before: float | None = None  # answers per second with more in flight
        self._slow_s = 0.0  # the median latency then
        self._settling = 0  # answers still to come to requests sent under the previous number
        self._next_s = 0.0
        self._again_s = AGAIN_S

    def answered(self, now_s: float, latency_s: float, others: int, limit: int, most: int, *, free: bool) -> None:
        """One answer came. `limit` may be in flight now, `most` at all; `free`: nothing else limits the rate."""
        if self._settling:
            self._settling -= 1
            self._start_round(now_s)
            return
        if self._started_s is None:
            self._started_s = now_s
        self._latencies.append(latency_s)
        if self._compared is not None:
            self._compare(now_s, self._compared, most)
        elif len(self._latencies) >= limit:
            self._watch(now_s, others, limit, free=free)

    def _watch(self, now_s: float, others: int, limit: int, *, free: bool) -> None:
        """A round is complete, at the number allowed: if it was slow, that number is measured."""
        if len(self._latencies) < LEAST_ROUND:
            return
        median_s = self._median_s()
        self._start_round(now_s)
        if self._fastest_s is None or median_s < self._fastest_s:
            self._fastest_s = median_s
        used = others >= FEWER * limit >= FEWER * LEAST_IN_FLIGHT
        if free and used and median_s > SLOWER * self._fastest_s and now_s >= self._next_s:
            self._measure(limit, None, median_s)

    def _compare(self, now_s: float, compared: int, most: int) -> None:
        """One more answer while `compared` are in flight: once there are enough, the cap falls, rises or stays."""
        count = len(self._latencies)
        one_round = self._before is not None and count == max(LEAST_ROUND, compared)
        if one_round and self._median_s() > AS_SLOW * self._slow_s:
            self._give_back(now_s, compared, most, "fewer in flight wait as long")
            return
        if count < max(LEAST_COMPARED, 3 * compared):
            return
        assert self._started_s is not None
        rate, median_s = count / max(1e-9, now_s - self._started_s), self._median_s()
        self._start_round(now_s)
        if self._before is not None and rate < AS_MUCH * self._before:
            self._give_back(now_s, compared, most, "fewer in flight deliver less")
        elif self._fastest_s is not None and median_s > SLOWER * self._fastest_s and compared > 2:
            self.cap = fewer = max(2, int(FEWER * compared))
            self._on_change("answers wait for each other")
            self._measure(fewer, max(rate, self._before or 0.0), median_s)
        else:
            self._end(now_s, AGAIN_S)

    def _measure(self, in_flight: int, before: float | None, slow_s: float) -> None:
        """Measures with so many in flight; `before` is the rate to compare with, None for the first measurement."""
        self._compared = self._settling = in_flight
        self._before, self._slow_s = before, slow_s

    def _give_back(self, now_s: float, compared: int, most: int, why: str) -> None:
        """Fewer were no better: the earlier number is allowed again, and the next trial is later."""
        earlier = int(compared / FEWER + 1)
        self.cap = None if earlier >= most else earlier
        self._on_change(why)
        self._end(now_s, self._again_s)
        self._again_s = min(MAX_AGAIN_S, 2 * self._again_s)

    def _end(self, now_s: float, again_s: float) -> None:
        self._compared = self._before = None
        self._next_s = now_s + again_s
        self._start_round(now_s)

    def _start_round(self, now_s: float) -> None:
        self._started_s = now_s
        self._latencies.clear()

    def _median_s(self) -> float:
        return sorted(self._latencies)[len(self._latencies) // 2]
