"""How many requests may be in flight: a slow start upwards, and two caps found while running. PURE."""

from batchrun.limits.crowding import Crowding
from batchrun.limits.useful_in_flight import UsefulInFlight

FIRST_IN_FLIGHT = 8
"""Requests in flight before anything is known: enough to fill a normal set of connections, few enough to be wrong."""

USED = 0.8
"""More is allowed only while this share is used: otherwise nothing shows that the endpoint can handle it."""

SILENT_S = 1.0
"""What was sent a second ago and not refused is being processed, so more may be sent: if answers take eight seconds, a
ramp that waits for them takes half a minute. One more at a time, as many per second as are allowed: if they were
doubled at once, half of them would meet an empty bucket in the same moment."""


class InFlight:
    """`allowed` is how many may be in flight now: the least of ramp, caps and `most`. `why` says why it is so.

    `crowding` caps it for servers that refuse too many at once, `knee` for servers that queue them.
    """

    def __init__(self, most: int, first: int = FIRST_IN_FLIGHT) -> None:
        self.most = most
        self.why = "at the start"
        self.crowding = Crowding(self._changed)
        self.knee = UsefulInFlight(self._changed)
        self._ramp = min(max(FIRST_IN_FLIGHT, first), most)
        self._ramp_to = most  # one more with every answer below it, one more per round above
        self._round = self._left_in_round = self._ramp  # answers per round, and still to come
        self._most_out = 0  # since the round began
        self._grown_s: float | None = None
        self._proven = False
        self.allowed = self._ramp

    def limit(self, most: int) -> None:
        """Sets a new upper limit; attempts above it are left to end."""
        self.most = most
        self._ramp = min(self._ramp, most)
        self._changed("set by the user")

    def sent(self, out: int, now_s: float) -> None:
        """One more was sent; `out` are in flight now."""
        if self._grown_s is None:
            self._grown_s = now_s
        if out > self._most_out:
            self._most_out = out

    def ready_s(self, out: int, now_s: float) -> float | None:
        """When one more may be sent with `out` in flight: now, at a later moment, or (None) when one has ended."""
        if out < self.allowed:
            return now_s
        if (test_s := self.crowding.next_test_s(now_s)) is not None:
            return test_s
        if not self._proven or self._ramp >= self.most or self.allowed < self._ramp or self._grown_s is None:
            return None
        if now_s < (next_s := self._grown_s + SILENT_S / self._ramp):
            return next_s
        self._grow(now_s, "nothing was refused for a while")
        return now_s

    def answered(self, out: int, now_s: float) -> None:
        """Adds one with every answer, which doubles the ramp every round; only while what is allowed is used.

        After trouble this holds up to a share of what was allowed before; beyond it, one is added every round.
        """
        self._proven = True
        if self._ramp >= self.most:
            return
        self._left_in_round -= 1
        round_is_over = self._left_in_round <= 0
        used = self._most_out >= USED * min(self._round, self.allowed)
        if used and (round_is_over or self._ramp < self._ramp_to):
            self._grow(now_s, "what was allowed was used, without trouble")
        if round_is_over:
            self._round = self._left_in_round = self._ramp
            self._most_out = out

    def unleash(self, out: int) -> None:
        """A rate no longer holds, under which `out` were in flight: the ramp starts again from there, not with all
        that was allowed at once.
        """
        if (ramp := max(FIRST_IN_FLIGHT, out)) < self._ramp:
            self._ramp = self._round = self._left_in_round = ramp
            self._most_out = out
            self._changed("a ramp, since no rate is known any more")

    def back_off(self, share: float, why: str, *, first: bool) -> None:
        """Restarts at one in flight; the ramp is fast up to `share` of what was allowed before the `first` trouble."""
        if first:
            self._ramp_to = max(1, int(self._ramp * share))
        self._ramp = self._round = self._left_in_round = 1
        self._most_out = 0
        self._changed(f"a ramp up to {self._ramp_to} after: {why}")

    def _grow(self, now_s: float, why: str) -> None:
        """Allows one more."""
        self._ramp, self._grown_s = self._ramp + 1, now_s
        self._changed(why)

    def _changed(self, why: str) -> None:
        """The ramp, a cap or `most` has changed. `allowed` is computed here because it is read for each row."""
        self.why = why
        numbers = self._ramp, self.most, self.crowding.cap, self.knee.cap
        self.allowed = min(number for number in numbers if number is not None)
