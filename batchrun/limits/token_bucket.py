"""The account of a rate limit that the gate draws on: what comes back with time, requests or tokens.

Pure arithmetic, in floats, because they accrue by the second. It does not know who asks, waits, or keeps the time:
`now_s` is an argument, in seconds of any clock that never jumps. What does not come back is in `purse`.
"""

BURST_S = 1.0
"""How many seconds of a limit may be spent at once. Small, so that the first minute keeps the limit as the others
do: a bucket as deep as the minute admits nearly twice the limit in its first one (measured: 119 of 60)."""

NOISE = 1e-6
"""A shortfall this small is rounding in a float, not a token that is missing; waiting for it would never end."""


class Bucket:
    """A limit per minute, kept by a level that rises with time and falls by what is taken.

    The level never rises above the capacity and may fall below zero: an answer longer than its estimate, or one
    request larger than the whole bucket, leaves a debt that later ones wait out. So the long-run rate is the
    limit whatever the sizes are, and nothing is too large to ever be sent.
    """

    __slots__ = ("_as_of_s", "_level", "_per_s", "capacity")

    def __init__(self, per_minute: float, now_s: float, *, burst_s: float = BURST_S, least: float = 0.0) -> None:
        """Full, with `burst_s` of the limit as its capacity, but never less than `least`."""
        self._per_s = per_minute / 60
        self.capacity = max(least, self._per_s * burst_s)
        self._level = self.capacity
        self._as_of_s = now_s

    def level(self, now_s: float) -> float:
        """What may be taken now without a debt; below zero while there is one."""
        self._rise(now_s)
        return self._level

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until `amount` may be taken; 0.0 when it may be taken now.

        More than a full bucket is never there: such a request waits for a full one, goes alone and leaves its debt.
        """
        self._rise(now_s)
        short = min(amount, self.capacity) - self._level
        return short / self._per_s if short > NOISE else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """The level is lower by `amount`, whether or not it was there."""
        self._rise(now_s)
        self._level -= amount

    def settle(self, actual_minus_estimate: float) -> None:
        """The level stands as if the actual number had been taken: a debt above zero, a refund below."""
        self._level = min(self.capacity, self._level - actual_minus_estimate)

    def change(self, per_minute: float, capacity: float, now_s: float) -> None:
        """From now on another limit holds; the level stays where it is, as far as the new capacity has room."""
        self._rise(now_s)
        self._per_s = per_minute / 60
        self.capacity = capacity
        self._level = min(capacity, self._level)

    def stand_at(self, level: float, now_s: float) -> None:
        """The level is this one: somebody who sees more of the account than we do has said so."""
        self._level = min(self.capacity, level)
        self._as_of_s = now_s

    def _rise(self, now_s: float) -> None:
        self._level = min(self.capacity, self._level + (now_s - self._as_of_s) * self._per_s)
        self._as_of_s = now_s
