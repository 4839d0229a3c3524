"""The FIFO in which attempts wait to be admitted, and what the gates of several endpoints share."""

import asyncio
from collections import deque
from collections.abc import Callable

from batchrun.limits.admission import Binding, Limit

TIMER_GRAIN_S = 0.001
"""Event loops count in milliseconds: a shorter timer, for a wait of a float's rounding error, would spin."""

UNLIMITED = Binding(Limit.LATENCY)


class AdmissionQueue:
    """FIFO, so that small requests never starve a large one. `blocker` is what the first waits for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._turns: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.blocker = UNLIMITED

    def __bool__(self) -> bool:
        """True while an attempt waits."""
        return bool(self._turns)

    async def wait(self, blocked_by: Callable[[], Binding | None]) -> None:
        """Returns when the caller is first and `blocked_by` returns None. The next one runs after the caller took."""
        turns = self._turns
        turn = self._loop.create_future()
        turns.append(turn)
        try:
            if turns[0] is not turn:
                await turn
            while (blocker := blocked_by()) is not None:
                turns[0] = turn = self._loop.create_future()
                self.blocker = blocker
                if blocker.until_s is not None:  # anything else wakes the queue when it is given back
                    at_s = max(blocker.until_s, self._loop.time() + TIMER_GRAIN_S)
                    self._timer = self._loop.call_at(at_s, self.wake)
                await turn
        finally:
            turns.remove(turn)
            self.wake()

    def wake(self) -> None:
        """The first in the queue checks again; its timer is cancelled."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turns and not self._turns[0].done():
            self._turns[0].set_result(None)
