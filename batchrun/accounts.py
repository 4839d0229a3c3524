"""Two accounts the gate draws on: what comes back with time (requests, tokens), and dollars, which do not.

Pure arithmetic. What accrues by the second is a float; money is `Decimal`, because it is a bill. Neither knows who
asks, waits, or keeps the time: `now_s` is an argument, in seconds of any clock that never jumps.
"""

from decimal import Decimal

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


class Purse:
    """`max_cost_usd`, a hard cap: spent + reserved never exceeds it.

    Spent is what was confirmed and what may have been billed; reserved is the sum of the upper bounds in flight.
    `spent_usd` starts at what earlier invocations of the run spent: the cap covers the run, not the process.
    """

    __slots__ = ("max_cost_usd", "reserved_usd", "spent_usd")

    def __init__(self, max_cost_usd: Decimal, spent_usd: Decimal = Decimal(0)) -> None:
        self.max_cost_usd = max_cost_usd
        self.spent_usd = spent_usd
        self.reserved_usd = Decimal(0)

    def fits(self, upper_bound_usd: Decimal | None) -> bool:
        """Whether a request that may cost this much can be sent without any risk to the cap.

        Raises:
            ValueError: the request has no upper bound, so no cap can be kept: a caller's bug, not a row's fault.
        """
        if upper_bound_usd is None:
            raise ValueError("max_cost_usd is set, but the request came without an upper bound of its cost")
        return self.spent_usd + self.reserved_usd + upper_bound_usd <= self.max_cost_usd

    def reserve(self, upper_bound_usd: Decimal) -> None:
        """The bound is set aside until it is settled."""
        self.reserved_usd += upper_bound_usd

    def settle(self, upper_bound_usd: Decimal, spent_usd: Decimal | None) -> None:
        """The reservation has become what was spent; None, a cost nobody knows, spends the whole of it."""
        self.reserved_usd -= upper_bound_usd
        self.spent_usd += upper_bound_usd if spent_usd is None else spent_usd
