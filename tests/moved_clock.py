"""An event loop whose clock is moved, not waited for: hours of timers pass in milliseconds, exactly on time.

Whenever nothing is ready to run, the clock jumps to the next timer. `loop.time()` is that clock, so everything that
asks the loop for the time (aiolimiter, asyncio.sleep, asyncio.timeout, the gate) lives on it. Real files and sockets
work too, but the clock does not wait for them.
"""

import asyncio
import selectors
from collections.abc import Coroutine, Mapping
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")

START_S = 1_000.0
"""Not zero, so that a time left at its default is noticed."""


class NothingWillHappen(AssertionError):
    """Every task waits and no timer is set: on a real loop this test would hang."""


class _JumpingSelector(selectors.SelectSelector):
    """Where a loop sleeps until its next timer, this one moves the clock there."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events and timeout is None:
            raise NothingWillHappen
        if not events and timeout is not None:
            self.now_s += max(0.0, timeout)
        return events


class MovedClockLoop(asyncio.SelectorEventLoop):
    """A loop at `START_S` seconds that jumps from timer to timer."""

    _default_executor: Executor | None

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Waits for its threads for real: asyncio's own waits for an event, of which this clock sees nothing coming."""
        executor, self._default_executor = self._default_executor, None
        if executor is not None:
            executor.shutdown()

    def call_exception_handler(self, context: Mapping[str, Any]) -> None:
        """An unhandled exception fails the test instead of being printed."""
        raise context.get("exception") or AssertionError(context["message"])


def run_on_moved_clock(main: Coroutine[Any, Any, T]) -> T:
    """What `main` returned, having run on a clock that jumps.

    Raises:
        NothingWillHappen: every task waited and no timer was set.
    """
    with asyncio.Runner(loop_factory=MovedClockLoop) as runner:
        return runner.run(main)
