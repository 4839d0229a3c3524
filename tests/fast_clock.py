"""An event loop whose clock runs faster than the real one: minutes of waiting pass in seconds, beside real sockets.

`loop.time()` is that clock, so pace, backoff, cooling, heartbeat and the connect timeout live on it; the deadline of an
attempt is kept on the real one. A connection is made by the kernel, which knows only the real clock: a job on a fast
clock sets `connect_timeout_s` to `patient(speed)`, or a busy machine makes 50 ms a connect timeout.

The clock counts what the loop waited for, and no pause of the process: on a busy machine, 50 ms in which another
process had the processor would be ten seconds here, and an outage by the product's clock.
"""

import asyncio
import selectors
import time
from collections.abc import Callable

TURN_S = 0.002
"""Real time that one turn of the loop may take by its clock; a turn that takes longer was not running all the time."""


class _HastySelector(selectors.DefaultSelector):
    """Sleeps for its share of the requested time, and keeps the loop's clock."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self._speed = speed
        self._real_s = time.monotonic()
        self._counted_s = 0.0

    def now_s(self) -> float:
        return self._counted_s * self._speed

    def _count(self, at_most_s: float) -> None:
        real_s = time.monotonic()
        self._counted_s += min(real_s - self._real_s, at_most_s)
        self._real_s = real_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self._count(TURN_S)
        for_s = None if timeout is None else max(0.0, timeout) / self._speed
        events = super().select(for_s)
        self._count(TURN_S if for_s is None else for_s)
        return events


class FastClockLoop(asyncio.SelectorEventLoop):
    """A second on the machine's clock is `speed` seconds here."""

    def __init__(self, speed: float) -> None:
        self._clock = _HastySelector(speed)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s()


def patient(speed: float) -> float:
    """The default connect timeout, 10 s of the real clock, as `connect_timeout_s` on a fast one."""
    return 10.0 * speed


def fast_clock(speed: float) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes such loops, as `asyncio.Runner` wants it."""
    return lambda: FastClockLoop(speed)
