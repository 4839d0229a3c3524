"""What became of attempts, in the order in which they were sent; and when a share of refusals is no chance. PURE.

Refusals come back at once and answers take their time, so the order of endings says little. A server decides when a
request arrives: only in the order of sending do refusals stand side by side where its bucket was empty.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

PATIENCE = 1.25
"""An attempt that is out for longer than refusals take, times this, counts as taken: the slack is for jitter."""

PATIENCE_KEPT = 0.9
"""The slowest refusal is forgotten by this much with each faster one."""


class Sent(msgspec.Struct):
    """One attempt: when it was sent, with how many others in flight, and for how many tokens.

    `refused` is None while nobody knows. `counts` is False for an attempt that proves nothing: it never reached the
    server.
    """

    at_s: float
    others: int
    tokens: int
    refused: bool | None = None
    counts: bool = True


class Trail:
    """Attempts in the order of sending, until it is known whether the server took them."""

    __slots__ = ("_first", "_out", "_patience_s")

    def __init__(self) -> None:
        self._first = 0
        self._out: deque[Sent] = deque()
        self._patience_s = 0.0

    @property
    def next_order(self) -> int:
        """The order that the next attempt will have."""
        return self._first + len(self._out)

    def sent(self, at_s: float, others: int, tokens: int) -> None:
        """One attempt more is out; its order is that of all before it, plus one."""
        self._out.append(Sent(at_s, others, tokens))

    def ended(self, order: int, now_s: float, *, refused: bool, counts: bool = True) -> None:
        """The attempt of this order was refused, or was not."""
        if order < self._first:
            return  # it was out for so long that it had counted as taken
        attempt = self._out[order - self._first]
        attempt.refused, attempt.counts = refused, counts
        if refused:
            self._patience_s = max(PATIENCE_KEPT * self._patience_s, now_s - attempt.at_s)

    def known(self, now_s: float) -> Iterator[tuple[int, Sent]]:
        """Attempts of which it has become known whether they were taken, with their order, in that order."""
        while self._out:
            attempt = self._out[0]
            if attempt.refused is None and not 0 < PATIENCE * self._patience_s <= now_s - attempt.at_s:
                return
            self._out.popleft()
            self._first += 1
            if attempt.counts:
                yield self._first - 1, attempt


class Walk:
    """A sequential test: is a share `much` refused, and not just the ordinary share?

    Each refusal takes a step up and each attempt that was taken one down, by the logarithm of how much more likely it
    is under the one than under the other (Wald's test). At zero it starts again. A share that is as ordinary reaches
    `bar` once in about e^bar excursions.
    """

    __slots__ = ("_at", "_bar", "_on_zero", "count", "refused")

    def __init__(self, bar: float, on_zero: Callable[[int, int], None] = lambda refused, count: None) -> None:
        """`on_zero` gets what an excursion that came to nothing has counted: refusals, and attempts."""
        self._bar = bar
        self._on_zero = on_zero
        self.clear()

    @property
    def is_at_zero(self) -> bool:
        """True between two excursions."""
        return not self._at

    @property
    def is_low(self) -> bool:
        """True while nothing is suspected."""
        return self._at < self._bar / 3

    def clear(self) -> None:
        """The next attempt begins a new excursion."""
        self._at = 0.0
        self.refused = self.count = 0

    def step(self, ordinary: float, much: float, *, refused: bool, times: float = 1.0) -> bool:
        """One attempt more; True where this refusal makes it too many, `times` as many as usual."""
        if not refused and not self._at:
            self._on_zero(0, 1)  # what nearly every attempt comes to, without a logarithm
            return False
        self.count += 1
        if refused:
            self.refused += 1
            self._at += math.log(much / ordinary)
            return self._at >= self._bar * times
        self._at += math.log((1 - much) / (1 - ordinary))
        if self._at <= 0:
            self._on_zero(self.refused, self.count)
            self.clear()
        return False


class Share:
    """The share of attempts that is refused in ordinary times, over the last few hundred of them."""

    __slots__ = ("_count", "_refused")

    MEMORY = 300
    """Attempts after which an older count is all but forgotten: a share of 1 % is known to within a per cent then, and
    a share that begins or ends is noticed within a few hundred requests."""

    PRIOR = 20
    """Attempts' worth of belief, before anything is known, that next to nothing is refused."""

    def __init__(self) -> None:
        self._refused = self._count = 0.0

    def __float__(self) -> float:
        return (self._refused + 0.0025 * self.PRIOR) / (self._count + self.PRIOR)

    @property
    def is_known(self) -> bool:
        """True once it says more than the prior."""
        return self._count >= 3 * self.PRIOR

    def add(self, refused: int, count: int) -> None:
        """So many more attempts, so many of them refused."""
        kept = max(0.0, 1 - count / self.MEMORY)
        self._refused = self._refused * kept + refused
        self._count = self._count * kept + count

    def be(self, share: float, count: int) -> None:
        """It is this, by so many attempts."""
        self._count = min(count, self.MEMORY)
        self._refused = share * self._count
