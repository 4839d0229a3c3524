"""A cap on requests in flight for a server that refuses too many at once. PURE.

Such a server refuses by concurrency, not by rate: refused requests were sent with more others in flight than accepted
ones. A rate limit met during ramp-up looks the same, so the cap is tried first and dropped if refusals continue.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence

from batchrun.limits.evidence import SequentialTest

REMEMBERED = 64
RECENT_S = 30.0
LEAST_ACCEPTED = 3
"""Fewer accepted attempts say nothing about how many the server accepts at once."""

OVERLAP = 0.35
"""The share of accepted attempts that may have had as many others in flight as a refused one: we see an attempt end
later than the server does."""

BELOW_REFUSED = 0.85
"""The first cap, as a share of the lowest refused number, rounded up: if 16 others are too many, 15 may be, too."""

TRIED = 3
"""The trial of a cap ends after this many times as many attempts as it allows, without too many refusals."""

TRIALS = 2
"""The first cap may be slightly too high; if the second one does not help either, the number in flight is no cause."""

PROBE_BAR = 5.0
LEAST_ORDINARY, TOO_MANY = 0.001, 0.3
"""A higher cap is too high if three in ten of the additional requests are refused: that is one refusal if no more than
two in a thousand are by chance, and two or three where a few per cent are."""

PROBE_EVERY_S = 1.0
MAX_PROBE_EVERY_S = 20.0
"""A higher cap is tried after a second, then 2, 4 … 20 s: each trial costs some refusals, and a raised limit is in
use within half a minute."""

TEST_EVERY_S, TEST_FOR_S = 0.1, 1.0
TESTS = 2
"""The empty bucket of a rate limit looks like a crowd, but soon has a request again. So one more than the first cap is
sent each tenth of a second, for a second. If two are accepted with more in flight than were refused, there is no crowd.
The first that is refused ends the test, and counts as the first trial of a higher cap."""

LOWERED = 0.9
LOWERED_AGAIN_S = 2.0
"""The cap is lowered when refusals return. If they return at once, concurrency is not the cause."""

RULED_OUT_FOR_S = 30.0
"""How long crowding is ruled out after it proved wrong; doubled each time."""


class Crowding:
    """The cap; None while there is none. `others` counts the other attempts in flight at the moment of sending.

    A new cap is on *trial* until refusals have stopped. Later a *probe* raises it, to see whether more are accepted.
    In the first second a *test* is one attempt more than the cap, which tells a crowd from an empty bucket.
    """

    __slots__ = (
        "_above",
        "_accepted",
        "_low",
        "_lowered_s",
        "_not_before_s",
        "_on_change",
        "_probe",
        "_probe_s",
        "_probing_from",
        "_refused",
        "_ruled_out_for_s",
        "_step",
        "_test_s",
        "_tests_from_s",
        "_trials",
        "_tried",
        "_wait_s",
        "cap",
    )

    def __init__(self, on_change: Callable[[str], None]) -> None:
        """`on_change` is called after each change of the cap, with its reason."""
        self._on_change = on_change
        self.cap: int | None = None
        self._accepted: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._refused: deque[int] = deque(maxlen=REMEMBERED)
        self._tried: int | None = None  # attempts accepted in this trial, None after it
        self._trials = 0
        self._probing_from: int | None = None  # the cap before the last probe
        self._probe = SequentialTest(PROBE_BAR)  # of what the probe sends beyond that cap
        self._probe_s = -1.0  # when the next probe may begin
        self._wait_s = PROBE_EVERY_S
        self._step = 1  # by which the next probe raises the cap
        self._lowered_s = self._not_before_s = -1.0
        self._ruled_out_for_s = RULED_OUT_FOR_S
        self._low = self._above = 0  # nearly the lowest number refused, and how many tests above it were accepted
        self._tests_from_s: float | None = None  # when tests began, until one of them decides
        self._test_s: float | None = None  # when the next one is due

    @property
    def on_trial(self) -> bool:
        """True until it is known whether the cap helps."""
        return self._tried is not None

    def next_test_s(self, now_s: float) -> float | None:
        """When one more than the cap is to be sent: now (which begins that test), later, or (None) never."""
        if self._test_s is None or self._tests_from_s is None or now_s < self._test_s:
            return self._test_s
        self._test_s = now_s + TEST_EVERY_S
        if self._test_s > self._tests_from_s + TEST_FOR_S:
            self._test_s = None
        return now_s

    def remember(self, now_s: float, others: Sequence[int]) -> None:
        """Attempts were accepted while there is no cap: each with so many others in flight."""
        self._accepted.extend([(now_s, each) for each in others])

    def accepted(self, now_s: float, sent_s: float, others: int, most: int, ordinary: float) -> bool:
        """An attempt was accepted; at most `most` may be in flight, and the share `ordinary` is refused by chance.

        True if that shows that there is no crowd: then the cap is dropped.
        """
        self._accepted.append((now_s, others))
        if self.cap is None:
            return False
        if self._is_test(sent_s) and others > self._low:
            self._above += 1
            if self._above >= TESTS:
                self._drop(now_s, "as many were accepted one by one")
                return True
        if self._tried is not None:
            self._tried += others + 1 >= 0.7 * self.cap  # fewer in flight would be accepted in any case
            if self._tried >= TRIED * self.cap:
                self._tried = None
                self._probe_s = now_s + self._wait_s
            return False
        if self._probing_from is not None and others >= self._probing_from:
            self._probe.step(max(LEAST_ORDINARY, ordinary), ordinary + TOO_MANY, refused=False)
        if now_s >= self._probe_s and others >= self.cap - 1 and self.cap < most:
            self._probing_from = self.cap
            self._probe.clear()
            self._set(min(most, self.cap + self._step), "nothing refused since")
            self._step = min(2 * self._step, max(1, self.cap // 4))
            self._probe_s = now_s + self._wait_s
        return False

    def refused(self, now_s: float, sent_s: float, others: int, ordinary: float) -> bool:
        """True if the cap explains the refusal: more were in flight than the server is known to accept."""
        if self._is_test(sent_s) and others >= self._low:
            self._tests_from_s = self._test_s = None
            self._wait_s = min(MAX_PROBE_EVERY_S, 2 * self._wait_s)
            return True
        capacity = self.cap if self._probing_from is None else self._probing_from
        if capacity is None or others < capacity:
            self._refused.append(others)
            return False
        is_probe = self._probing_from is not None
        if is_probe and self._probe.step(max(LEAST_ORDINARY, ordinary), ordinary + TOO_MANY, refused=True):
            self._set(self._probing_from, "more were refused")
            self._probing_from, self._step = None, 1
            self._wait_s = min(MAX_PROBE_EVERY_S, 2 * self._wait_s)
            self._probe_s = now_s + self._wait_s
        return True

    def suspect(self, now_s: float, refused: int) -> bool:
        """Starts a cap on trial and returns True if the last refusals had more in flight than accepted attempts."""
        if now_s < self._not_before_s or self.cap is not None:
            return False
        accepted = [others for at_s, others in self._accepted if now_s - at_s < RECENT_S]
        numbers = sorted(list(self._refused)[-refused:])
        if len(accepted) < LEAST_ACCEPTED or len(numbers) < refused:
            return False
        low = numbers[len(numbers) // 10]  # not the lowest: a tenth may have been refused by chance
        if low < 2 or sum(others >= low for others in accepted) > OVERLAP * len(accepted):
            return False
        self._trials = 0
        self._low, self._above = low, 0
        self._tests_from_s, self._test_s = now_s, now_s + TEST_EVERY_S
        self._try(low, now_s)
        return True

    def doubt(self, now_s: float) -> bool:
        """Too much is refused below the cap: lowers it (True), or drops it as the wrong explanation (False)."""
        assert self.cap is not None
        if self._tried is not None and self._trials < TRIALS and self.cap > 1:
            self._try(self.cap - 1, now_s)
            return True
        if self._tried is None and now_s - self._lowered_s > LOWERED_AGAIN_S and self.cap > 1:
            self._lowered_s, self._probe_s = now_s, now_s + self._wait_s
            self._probing_from = None
            self._set(max(1, min(self.cap - 1, int(self.cap * LOWERED))), "still refused")
            return True
        self._drop(now_s, "fewer in flight did not help")
        return False

    def _is_test(self, sent_s: float) -> bool:
        """True for an attempt that was sent during the tests."""
        return self._tests_from_s is not None and 0 < sent_s - self._tests_from_s <= TEST_FOR_S

    def _drop(self, now_s: float, why: str) -> None:
        """It was the wrong explanation."""
        self._tried = self._probing_from = self._tests_from_s = self._test_s = None
        self._not_before_s = now_s + self._ruled_out_for_s
        self._ruled_out_for_s *= 2
        self._set(None, why)

    def _try(self, low: int, now_s: float) -> None:
        """Starts the trial of a cap below `low` others in flight."""
        self._trials += 1
        self._tried, self._probing_from, self._step, self._wait_s = 0, None, 1, PROBE_EVERY_S
        self._lowered_s = now_s
        self._set(math.ceil(BELOW_REFUSED * low), f"refused with {low} and more others in flight")

    def _set(self, cap: int | None, why: str) -> None:
        self.cap = cap
        self._on_change(why)
