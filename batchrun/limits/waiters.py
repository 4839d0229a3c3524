"""Tasks that wait until something has changed, or a moment has come: a future and at most one timer for each."""

import asyncio


class Waiters:
    """One for each thing that is waited for. One per event loop. (`asyncio.wait_for` would take a task each.)"""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def __bool__(self) -> bool:
        """True while somebody waits."""
        return bool(self._waiting)

    async def wait(self, most_s: float | None = None) -> None:
        """Returns when `wake` was called, or after so many seconds."""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.add(waiter)
        timer = None if most_s is None else loop.call_later(max(0.0, most_s), _release, waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    def wake(self) -> None:
        """Everyone who waits looks again."""
        for waiter in self._waiting:
            _release(waiter)


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
