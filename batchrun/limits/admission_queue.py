"""The FIFO in which attempts wait to be admitted, and what the gates of several endpoints share."""

import asyncio
from collections import deque
from collections.abc import Callable

from batchrun.limits.admission import Binding, Demand, Limit

TIMER_GRAIN_S = 0.001
"""Event loops count in milliseconds: a shorter timer, for a wait of a float's rounding error, would spin."""

UNLIMITED = Binding(Limit.LATENCY)

Try = Callable[[Demand, bool], int | Binding]
"""Takes everything that an attempt needs, and returns its slot; or takes nothing and returns what blocks it."""


class AdmissionQueue:
    """FIFO, so that small requests never starve a large one. `blocker` is what the first waits for.

    All that can go are granted in one pass, so that none is woken for a thing that another one takes.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[tuple[asyncio.Future[int], Try, Demand, bool]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_woken = False
        self.blocker = UNLIMITED

    def __bool__(self) -> bool:
        """True while an attempt waits."""
        return bool(self._waiting)

    async def admit(self, try_: Try, demand: Demand, probes: bool, give_back: Callable[[int], None]) -> int:
        """The attempt's slot, as soon as `try_` returns one and no other attempt waits before it.

        `give_back` gets the slot if the caller is cancelled just after it was granted.
        """
        if not self._waiting:
            granted = try_(demand, probes)
            if isinstance(granted, int):
                return granted
            self._block(granted)
        turn: asyncio.Future[int] = self._loop.create_future()
        self._waiting.append((turn, try_, demand, probes))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.cancelled():  # the next attempt may fit where this one did not
                self._waiting = deque(waiting for waiting in self._waiting if waiting[0] is not turn)
                self._stop_timer()
                self.wake()
            elif turn.exception() is None:
                give_back(turn.result())
            raise

    def wake(self) -> None:
        """Those in the queue that can go are granted once the event loop has heard of all that has just happened."""
        if self._waiting and not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._grant_all)

    def _grant_all(self) -> None:
        """Grants from the front, up to the first attempt that has to wait."""
        self._is_woken = False
        self._stop_timer()
        while self._waiting:
            turn, try_, demand, probes = self._waiting[0]
            if not turn.done():  # else it is being cancelled
                try:
                    granted = try_(demand, probes)
                except Exception as error:  # it can't be admitted at all
                    turn.set_exception(error)
                else:
                    if not isinstance(granted, int):
                        self._block(granted)
                        return
                    turn.set_result(granted)
            self._waiting.popleft()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _block(self, blocker: Binding) -> None:
        """The first one waits; a timer wakes the queue if time alone lifts the block."""
        self.blocker = blocker
        if blocker.until_s is not None:
            at_s = max(blocker.until_s, self._loop.time() + TIMER_GRAIN_S)
            self._timer = self._loop.call_at(at_s, self._grant_all)
