"""How many requests may be in flight: a ramp upwards, and two caps that are found (`crowding`, `knee`). PURE."""

from batchrun.limits.crowding import Crowding
from batchrun.limits.useful_in_flight import UsefulInFlight

FIRST_IN_FLIGHT = 8
"""Requests in flight before anything is known: enough to fill a normal connection set, few enough to be wrong with."""

USED = 0.8
"""More is allowed only while so much of it is used: else nobody knows whether the endpoint bears it."""

SILENT_S = 1.0
"""What was sent a second ago and not refused is being worked on, so more may go out: where answers take eight seconds,
a ramp that waits for them takes half a minute. One more at a time, as many in a second as are allowed: if they were
doubled at once, half of them would meet an empty bucket in the same moment."""


class InFlight:
    """The number in use: the least of the ramp and the caps, and never more than `most`."""

    def __init__(self, most: int, first: int = FIRST_IN_FLIGHT) -> None:
        self.most = most
        self.why = "at the start"
        self.crowding = Crowding(self._capped)
        self.knee = UsefulInFlight(self._capped)
        self._ramp = min(max(FIRST_IN_FLIGHT, first), most)
        self._ramp_to = most  # below it one more with every answer, above it with every round
        self._round = self._left_in_round = self._ramp  # answers a round has, and still lacks
        self._most_out = 0  # since the round began
        self._grown_s: float | None = None
        self._proven = False

    @property
    def allowed(self) -> int:
        """How many may be in flight now."""
        allowed = min(self._ramp, self.most)
        if self.crowding.cap is not None:
            allowed = min(allowed, self.crowding.cap)
        if self.knee.cap is not None:
            allowed = min(allowed, self.knee.cap)
        return allowed

    def limit(self, most: int) -> None:
        """No more than so many from now on, as attempts that are out end."""
        self.most = most
        self._ramp = min(self._ramp, most)
        self.why = "told"

    def sent(self, out: int, now_s: float) -> None:
        """One more went out; so many are out now."""
        if self._grown_s is None:
            self._grown_s = now_s
        if out > self._most_out:
            self._most_out = out

    def ready_s(self, out: int, now_s: float) -> float | None:
        """When one more may go, with so many out: now, at a later moment, or (None) when one has ended."""
        if out < self.allowed:
            return now_s
        if not self._proven or self._ramp >= self.most or self.allowed < self._ramp or self._grown_s is None:
            return None
        if now_s < (next_s := self._grown_s + SILENT_S / self._ramp):
            return next_s
        self._grow_to(self._ramp + 1, now_s, "nothing was refused for a while")
        return now_s

    def answered(self, out: int, now_s: float) -> None:
        """One more with every answer, which doubles it with every round; after a trouble only up to what was borne
        before, and one more a round from there. Only while what is allowed is used.
        """
        self._proven = True
        if self._ramp >= self.most:
            return
        self._left_in_round -= 1
        round_is_over = self._left_in_round <= 0
        used = self._most_out >= USED * min(self._round, self.allowed)
        if used and (round_is_over or self._ramp < self._ramp_to):
            self._grow_to(self._ramp + 1, now_s, "what was allowed was used, without trouble")
        if round_is_over:
            self._round = self._left_in_round = self._ramp
            self._most_out = out

    def calm_down(self, share: float, why: str, *, first: bool) -> None:
        """One in flight, and then a ramp up to this share of what was allowed before the `first` trouble."""
        if first:
            self._ramp_to = max(1, int(self._ramp * share))
        self._ramp = self._round = self._left_in_round = 1
        self._most_out = 0
        self.why = f"a ramp up to {self._ramp_to} after: {why}"

    def _grow_to(self, ramp: int, now_s: float, why: str) -> None:
        self._ramp, self._grown_s, self.why = ramp, now_s, why

    def _capped(self, before: int | None, after: int | None, why: str) -> None:
        self.why = why
