"""An event loop whose clock runs faster than the real one: minutes of waiting pass in seconds, beside real sockets.

`loop.time()` is that clock, so pace, backoff, cooling, heartbeat and the connect timeout live on it; the deadline of an
attempt is kept on the real one. A connection is made by the kernel, which knows only the real clock: a job on a fast
clock sets `connect_timeout_s` to `patient(speed)`, or a busy machine makes 50 ms a connect timeout.
"""

import asyncio
import selectors
import time
from collections.abc import Callable


class _HastySelector(selectors.DefaultSelector):
    """Sleeps for its part of the time that it is told."""

    speed: float = 1.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout and timeout / self.speed)


class FastClockLoop(asyncio.SelectorEventLoop):
    """A second on the machine's clock is `speed` seconds here."""

    def __init__(self, speed: float) -> None:
        selector = _HastySelector()
        selector.speed = self._speed = speed
        super().__init__(selector)

    def time(self) -> float:
        return time.monotonic() * self._speed


def patient(speed: float) -> float:
    """The default connect timeout, 10 s of the real clock, as `connect_timeout_s` on a fast one."""
    return 10.0 * speed


def fast_clock(speed: float) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes such loops, as `asyncio.Runner` wants it."""
    return lambda: FastClockLoop(speed)
