"""A cap on requests in flight where a server refuses what is too many at once. PURE.

Such a server refuses by number and not by rate: what was refused was sent with more others in flight than what was
taken. That is a suspicion only, as it also looks so where a limit is met while the number in flight still grows. So it
is tried: with fewer in flight, refusals end; where it was a limit, they go on, and the cap goes.
"""

from collections import deque
from collections.abc import Callable

REMEMBERED = 64
RECENT_S = 30.0
LEAST_TAKEN = 3
"""Fewer attempts that were taken say nothing of how many at once are borne."""

OVERLAP = 0.35
"""Attempts that were taken although as many others were in flight as with a refused one: up to this share may be so,
since we see an ending later than the server does."""

BELOW_REFUSED = 0.85
"""The first cap, of the least number that was refused: where 16 others are too many, for the same delay 15 may be."""

TRIED = 3
"""A cap is believed after as many attempts as it allows, times this, without too many refusals."""

PROBE_EVERY_S = 1.0
MAX_PROBE_EVERY_S = 20.0
"""More is tried after a second, then 2, 4 … 20 s: each time costs some refusals, and a cap that was raised is in use
within half a minute."""

LOWERED = 0.9
LOWERED_AGAIN_S = 2.0
"""Where refusals come back, the cap is too high. Where they come back at once, it is no matter of numbers."""

WRONG_FOR_S = 30.0
"""How long crowding is not suspected again after it was wrong; twice as long the next time."""


class Crowding:
    """The cap, None while there is none. `others` are always other attempts in flight, at the moment of sending."""

    __slots__ = (
        "_lowered_s",
        "_not_before_s",
        "_on_change",
        "_probe_s",
        "_probing_from",
        "_refused",
        "_step",
        "_taken",
        "_tried",
        "_wait_s",
        "_wrong_for_s",
        "cap",
    )

    def __init__(self, on_change: Callable[[int | None, int | None, str], None]) -> None:
        """`on_change` is told each change of the cap: before, after, why."""
        self._on_change = on_change
        self.cap: int | None = None
        self._taken: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._refused: deque[int] = deque(maxlen=REMEMBERED)
        self._tried: int | None = None
        self._probing_from: int | None = None
        self._lowered_s = self._probe_s = self._not_before_s = -1.0
        self._wait_s = PROBE_EVERY_S
        self._step = 1
        self._wrong_for_s = WRONG_FOR_S

    @property
    def on_trial(self) -> bool:
        """True while it is not known whether the cap helps."""
        return self._tried is not None

    def took(self, now_s: float, others: int, most: int) -> None:
        """An attempt was taken; `most` is the most that may be in flight at all."""
        self._taken.append((now_s, others))
        if self.cap is None:
            return
        if self._tried is not None:
            self._tried += others + 1 >= 0.7 * self.cap
            if self._tried >= TRIED * self.cap:
                self._tried = None
                self._probe_s = now_s + self._wait_s
        elif now_s >= self._probe_s and others >= self.cap - 1 and self.cap < most:
            self._probing_from = self.cap
            self._set(min(most, self.cap + self._step), "nothing refused since")
            self._step = min(2 * self._step, max(1, self.cap // 4))
            self._probe_s = now_s + self._wait_s

    def refused(self, now_s: float, others: int) -> bool:
        """True where the cap explains the refusal: it was sent with more in flight than is known to be borne."""
        borne = self.cap if self._probing_from is None else self._probing_from
        if borne is None or others < borne:
            self._refused.append(others)
            return False
        if self._probing_from is not None:
            self._set(self._probing_from, "more were refused")
            self._probing_from, self._step = None, 1
            self._wait_s = min(MAX_PROBE_EVERY_S, 2 * self._wait_s)
            self._probe_s = now_s + self._wait_s
        return True

    def suspect(self, now_s: float, refused: int, overlap: float = OVERLAP) -> bool:
        """True, and a cap on trial, where the last refusals were sent with more in flight than what was taken."""
        if now_s < self._not_before_s or self.cap is not None:
            return False
        taken = [others for at_s, others in self._taken if now_s - at_s < RECENT_S]
        numbers = sorted(list(self._refused)[-refused:])
        if len(taken) < LEAST_TAKEN or len(numbers) < refused:
            return False
        low = numbers[len(numbers) // 10]
        if low < 2 or sum(others >= low for others in taken) > overlap * len(taken):
            return False
        self._tried, self._probing_from, self._step, self._wait_s = 0, None, 1, PROBE_EVERY_S
        self._lowered_s = now_s
        self._set(max(1, int(BELOW_REFUSED * low)), f"refused with {low} and more others in flight")
        return True

    def doubt(self, now_s: float) -> bool:
        """Too much is refused below the cap: it is lowered, or (False) given up, as it was no matter of numbers."""
        assert self.cap is not None
        if self._tried is None and now_s - self._lowered_s > LOWERED_AGAIN_S and self.cap > 1:
            self._lowered_s, self._probe_s = now_s, now_s + self._wait_s
            self._probing_from = None
            self._set(max(1, min(self.cap - 1, int(self.cap * LOWERED))), "still refused")
            return True
        self._tried = self._probing_from = None
        self._not_before_s = now_s + self._wrong_for_s
        self._wrong_for_s *= 2
        self._set(None, "fewer in flight did not help")
        return False

    def _set(self, cap: int | None, why: str) -> None:
        before, self.cap = self.cap, cap
        self._on_change(before, cap, why)
