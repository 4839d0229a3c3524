"""How fast one kind of thing may go: requests, tokens, input tokens, output tokens. PURE.

A pace has what the user told, and keeps it with a `Bucket`. Without a limit it has none and costs next to nothing.
"""

from collections.abc import Callable

from batchrun.accounts import BURST_S, Bucket
from batchrun.admission import Limit

PaceChange = Callable[[Limit, float | None, float | None, str], None]
"""Called with the limit, its rate per minute before and after (None: no limit), and why."""


class Pace:
    """One limit's pace. `per_minute` is what holds now, None while nothing does.

    Each request may take `least` at once, whatever the rate: 1 for requests, 0 for tokens, where any size can wait.
    """

    __slots__ = ("_bucket", "_least", "_on_change", "limit", "per_minute", "told")

    def __init__(self, limit: Limit, told: float | None, now_s: float, on_change: PaceChange) -> None:
        self.limit = limit
        self.told = told
        self.per_minute = told
        self._least = 1.0 if limit is Limit.REQUESTS else 0.0
        self._on_change = on_change
        self._bucket = None if told is None else Bucket(told, now_s, least=self._least)

    def ready_in_s(self, amount: float, now_s: float) -> float:
        """Seconds until so much may be taken; 0.0 when it may be taken now."""
        return 0.0 if self._bucket is None else self._bucket.ready_in_s(amount, now_s)

    def take(self, amount: float, now_s: float) -> None:
        """So much is taken."""
        if self._bucket is not None:
            self._bucket.take(amount, now_s)

    def settle(self, actual_minus_estimate: float) -> None:
        """What was taken was so much more than was thought, or less if negative."""
        if self._bucket is not None:
            self._bucket.settle(actual_minus_estimate)

    def tell(self, per_minute: float, now_s: float) -> None:
        """The user tells another limit, which holds from now on. No burst comes with it."""
        self.told = per_minute
        self._set(per_minute, "told", now_s)

    def _set(self, per_minute: float, why: str, now_s: float) -> None:
        before, self.per_minute = self.per_minute, per_minute
        capacity = max(self._least, per_minute / 60 * BURST_S)
        if self._bucket is None:
            self._bucket = Bucket(per_minute, now_s, least=self._least)
        else:
            self._bucket.change(per_minute, capacity, now_s)
        if before != per_minute:
            self._on_change(self.limit, before, per_minute, why)
