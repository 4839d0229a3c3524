"""A limit as measured so far: how far to believe it, and what it says about the server's bucket. PURE.

A measurement lies between two refusals. If one of them was by chance, something was left in the bucket, and less than
the limit was measured. So a lower figure than before may be chance or a lowered limit, and only trying tells.
"""

AGREES, AGREES_COUNT = 0.01, 2.0
"""Two measurements agree within one percent, and two of the requests counted: over twenty requests, a tenth."""

KEPT = 0.997
"""Of two measurements that agree, the higher one holds: by chance it is never too high. But not for good."""

MET = 0.05
"""A rate this near to the limit is that limit, met once more."""

SLACK = 2.0
"""The bucket counts as empty with up to two requests in it: clocks and networks blur the moment."""


class KnownLimit:
    """`per_s` is the last measurement, None without one; `is_sure` if the one before agreed with it.

    If less is measured than a limit that was sure, that limit is `doubted`. It is tried once more (`go_back`): refusals
    then prove the lower one right, and their absence the higher one (`confirm`).
    """

    __slots__ = ("_climb_s", "_level", "_total", "doubted", "is_back", "is_sure", "per_s")

    def __init__(self) -> None:
        self.per_s: float | None = None
        self.is_sure = False
        self.doubted: float | None = None
        self.is_back = False
        self._climb_s = self._total = self._level = 0.0

    def measure(self, per_s: float, count: float, *, by_chance: bool) -> float:
        """Takes a measurement over `count` requests; returns what is now believed to be the limit.

        `by_chance`: the refusal at its end may have been by chance.
        """
        known, error = self.per_s, AGREES + AGREES_COUNT / max(1.0, count)
        was_sure, self.is_sure = self.is_sure, known is not None and abs(per_s - known) <= error * known
        self.doubted, self.is_back = None, False
        if known is not None and self.is_sure:
            per_s = max(per_s, KEPT * known)
        elif known is not None and was_sure and by_chance and per_s < known:
            self.doubted = known
        self.per_s = per_s
        return per_s

    def go_back(self) -> float:
        """The doubted limit is tried again. Returns it."""
        assert self.doubted is not None
        self.is_back = True
        return self.doubted

    def confirm(self) -> None:
        """The doubted limit was tried, and nothing spoke against it."""
        self.per_s, self.doubted, self.is_back, self.is_sure = self.doubted, None, False, True

    def climb(self, now_s: float, total: float, level: float) -> None:
        """A higher rate is tried from now on; `total` was accepted so far, and the server's bucket holds `level`."""
        self._climb_s, self._total, self._level = now_s, total, level

    def is_met(self, per_s: float) -> bool:
        """True if this measurement is about the limit that was known."""
        return self.per_s is not None and abs(per_s - self.per_s) <= MET * self.per_s

    def is_passed(self, per_s: float) -> bool:
        """True if this measurement shows that the limit is higher than was known."""
        return self.per_s is not None and per_s > (1 + MET) * self.per_s

    def has_emptied(self, climbed_to: float | None, at_s: float, total: float, amount: float) -> bool:
        """True if the climb to this rate has emptied the server's bucket, so that refusals of `amount` are expected.

        `total` was accepted by `at_s`.
        """
        if self.per_s is None or not self.is_sure or climbed_to is None or climbed_to <= self.per_s:
            return False
        level = self._level + self.per_s * (at_s - self._climb_s) - (total - self._total)
        return level <= SLACK * amount
