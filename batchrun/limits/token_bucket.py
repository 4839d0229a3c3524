"""A token bucket. PURE.

Pure arithmetic in floats; `now_s` is an argument, in seconds of any clock that never jumps.
"""

BURST_S = 1.0
"""How many seconds of a limit may be sent at once. Small, so that the first minute keeps the limit like any other: a
bucket as deep as the minute admits nearly twice the limit in its first one (measured: 119 of 60)."""

NOISE = 1e-6
"""A smaller shortfall is a float's rounding error; waiting for it would never end."""


class Bucket:
    """A limit per minute, kept by a level that rises with time and falls by what is taken.

    The level never rises above the capacity and may fall below zero: an answer longer than its estimate, or one
    request larger than the whole bucket, leaves a debt that later ones wait out. So the long-run rate is the
    limit whatever the sizes are, and nothing is too large to ever be sent.
    """

    __slots__ = ("_as_of_s", "_level", "_per_s", "capacity")

    def __init__(self, per_minute: float, now_s: float, *, burst_s: float = BURST_S, least: float = 0.0) -> None:
        """Starts full, with a capacity of `burst_s` of the limit, but at least `least`."""
        self._per_s = per_minute / 60
        self.capacity = max(least, self._per_s * burst_s)
        self._level = self.capacity
        self._as_of_s = now_s

    def level(self, now_s: float) -> float:
        """What may be taken now; below zero there is a debt."""
        self._rise(now_s)
        return self._level

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0.0 if it may be taken now.

        An amount above the capacity waits for a full bucket, goes alone and leaves a debt.
        """
        self._rise(now_s)
        short = min(amount, self.capacity) - self._level
        return short / self._per_s if short > NOISE else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Lowers the level by `amount`, below zero if need be."""
        self._rise(now_s)
        self._level -= amount

    def settle(self, actual_minus_estimate: float) -> None:
        """Corrects the level to what was actually taken: a debt if positive, a refund if negative."""
        self._level = min(self.capacity, self._level - actual_minus_estimate)

    def change(self, per_minute: float, capacity: float, now_s: float) -> None:
        """Changes the limit; the level stays, unless the new capacity is lower."""
        self._rise(now_s)
        self._per_s = per_minute / 60
        self.capacity = capacity
        self._level = min(capacity, self._level)

    def stand_at(self, level: float, now_s: float) -> None:
        """Sets the level to what a better source reports."""
        self._level = min(self.capacity, level)
        self._as_of_s = now_s

    def _rise(self, now_s: float) -> None:
        self._level = min(self.capacity, self._level + (now_s - self._as_of_s) * self._per_s)
        self._as_of_s = now_s
