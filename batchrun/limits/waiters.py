"""Lets tasks wait until something changes or a time comes: a future and at most one timer each."""

import asyncio


class Waiters:
    """The tasks waiting for one thing. One event loop only. (`asyncio.wait_for` would cost a task each.)"""

    def __init__(self) -> None:
        self._waiting: set[asyncio.Future[None]] = set()

    def __bool__(self) -> bool:
        """True while a task waits."""
        return bool(self._waiting)

    async def wait(self, most_s: float | None = None) -> None:
        """Returns when `wake` was called, or after `most_s` seconds."""
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
        """Wakes all waiting tasks."""
        for waiter in self._waiting:
            _release(waiter)


def _release(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
