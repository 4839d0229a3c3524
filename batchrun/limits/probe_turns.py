"""Who chooses a row while the endpoint is in doubt: one worker at a time, when the row can be sent."""

import asyncio

from batchrun.limits.admission import OPEN, Binding, Limit
from batchrun.limits.circuit import Circuit
from batchrun.limits.waiters import Waiters


class InDoubt(Exception):
    """The endpoint came into doubt while the row waited: it goes back, and the next one to be sent is chosen then."""


class ProbeTurns:
    """While the gate is open everyone chooses at once. In doubt one chooses, and no other until that row has ended.

    A row that was chosen before would say nothing: of a hundred bad rows in a row, the workers would hold the first.
    """

    def __init__(self, state: Circuit, loop: asyncio.AbstractEventLoop) -> None:
        self._state = state
        self._loop = loop
        self._waiters = Waiters()
        self._chosen = False

    @property
    def barred(self) -> Binding | None:
        """What keeps a worker from choosing a row; None where it may."""
        if self._state.phase is OPEN or not self._state.in_doubt:
            return None
        return Binding(Limit.PROBING) if self._chosen else self._state.binding(self._loop.time())

    async def take(self) -> bool:
        """Returns when the caller may choose a row; True where this row is the probe."""
        while (barred := self.barred) is not None:
            await self._waiters.wait(None if barred.until_s is None else barred.until_s - self._loop.time())
        if not self._state.in_doubt:
            return False
        self._chosen = True
        return True

    def end(self) -> None:
        """Who had the turn has sent its row, or has found none."""
        self._chosen = False
        self.wake()

    def wake(self) -> None:
        """Those who wait look again, if one of them may choose now."""
        if self._waiters and self.barred is None:
            self._waiters.wake()
