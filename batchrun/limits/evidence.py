"""Attempts in the order of sending, and sequential tests on the share that is refused. PURE.

The order of sending matters, not that of ending: a server decides when a request arrives, and refusals return faster
than answers. Only in the order of sending do refusals stand side by side where a bucket was empty.
"""

import math
from collections import deque
from collections.abc import Callable

import msgspec

PATIENCE = 1.25
"""An attempt in flight for this many times as long as refusals take counts as accepted; the slack is for jitter."""

PATIENCE_KEPT = 0.9
"""The factor by which the slowest refusal is forgotten with each faster one."""


class Sent(msgspec.Struct, gc=False):
    """One attempt: when it was sent, with how many others in flight, and for how many tokens.

    `refused` is None while unknown. `counts` is False if it never reached the server, which proves nothing.
    """

    at_s: float
    others: int
    tokens: int
    refused: bool | None = None
    counts: bool = True


class SendLog:
    """Attempts in the order of sending, each kept until it is known whether the server accepted it."""

    __slots__ = ("_first", "_out", "_patience_s")

    def __init__(self) -> None:
        self._first = 0
        self._out: deque[Sent] = deque()
        self._patience_s = 0.0

    @property
    def next_order(self) -> int:
        """The order of the next attempt."""
        return self._first + len(self._out)

    def sent(self, at_s: float, others: int, tokens: int) -> None:
        """Adds an attempt; its order is one more than that of the last."""
        self._out.append(Sent(at_s, others, tokens))

    def ended(self, order: int, now_s: float, *, refused: bool, counts: bool = True) -> None:
        """Records whether the attempt of this order was refused."""
        if order < self._first:
            return  # it took so long that it was counted as accepted
        attempt = self._out[order - self._first]
        attempt.refused, attempt.counts = refused, counts
        if refused:
            self._patience_s = max(PATIENCE_KEPT * self._patience_s, now_s - attempt.at_s)

    def known(self, now_s: float) -> list[tuple[int, Sent]]:
        """The attempts, in order, for which it is now known whether they were accepted, each with its order."""
        known, out, order = [], self._out, self._first
        while out:
            attempt = out[0]
            if attempt.refused is None and not 0 < PATIENCE * self._patience_s <= now_s - attempt.at_s:
                break
            out.popleft()
            if attempt.counts:
                known.append((order, attempt))
            order += 1
        self._first = order
        return known


class SequentialTest:
    """A sequential test (Wald): is the refused share `much`, or only `ordinary`?

    Each refusal steps up and each accepted attempt steps down, by the log of the likelihood ratio. At zero it starts
    again. With an ordinary share it reaches `bar` about once in e^bar excursions. `level` is the evidence so far, 0
    while nothing is suspected; `refused` and `count` are of this excursion.
    """

    __slots__ = ("_bar", "_on_zero", "count", "level", "refused")

    def __init__(self, bar: float, on_zero: Callable[[int, int], None] = lambda refused, count: None) -> None:
        """`on_zero` is called when an excursion ends below the bar, with its refusals and its attempts."""
        self._bar = bar
        self._on_zero = on_zero
        self.clear()

    def clear(self) -> None:
        """Starts a new excursion."""
        self.level = 0.0
        self.refused = self.count = 0

    def step(self, ordinary: float, much: float, *, refused: bool, times: float = 1.0) -> bool:
        """Adds one attempt; True if this refusal reaches the bar, raised by the factor `times`."""
        if not refused and not self.level:
            self._on_zero(0, 1)  # nearly every attempt takes this path, without a logarithm
            return False
        self.count += 1
        if refused:
            self.refused += 1
            self.level += math.log(much / ordinary)
            return self.level >= self._bar * times
        self.level += math.log((1 - much) / (1 - ordinary))
        if self.level <= 0:
            self._on_zero(self.refused, self.count)
            self.clear()
        return False


class RefusedShare:
    """The refused share in ordinary times: a moving average over a few hundred attempts, of which so many `refused`."""

    __slots__ = ("_count", "refused")

    MEMORY = 300
    """Attempts after which an older count is nearly forgotten: a share of 1 % is then known to within one percent, and
    a share that begins or ends is noticed within a few hundred requests."""

    PRIOR = 20
    """Weight of the initial belief that almost nothing is refused, in attempts."""

    def __init__(self) -> None:
        self.refused = self._count = 0.0

    def __float__(self) -> float:
        return (self.refused + 0.0025 * self.PRIOR) / (self._count + self.PRIOR)

    @property
    def is_known(self) -> bool:
        """True once observations outweigh the prior."""
        return self._count >= 3 * self.PRIOR

    def add(self, refused: int, count: int) -> None:
        """Adds attempts, so many of them refused."""
        kept = max(0.0, 1 - count / self.MEMORY)
        self.refused = self.refused * kept + refused
        self._count = self._count * kept + count

    def set(self, share: float, count: int) -> None:
        """Sets the share, as measured over so many attempts."""
        self._count = min(count, self.MEMORY)
        self.refused = share * self._count
