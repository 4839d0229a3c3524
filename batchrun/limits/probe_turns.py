"""While the endpoint is in doubt, workers choose rows one at a time, each when its row can be sent."""

import asyncio
from typing import Protocol

from batchrun.limits.admission import Binding, Limit
from batchrun.limits.waiters import Waiters


class Breaker(Protocol):
    """The circuit of one endpoint, or those of several as one."""

    @property
    def in_doubt(self) -> bool: ...

    def binding(self, now_s: float) -> Binding | None: ...


class InDoubt(Exception):
    """The endpoint became doubtful while the row waited. The row goes back, and the probe is chosen later."""


class ProbeTurns:
    """Any worker may choose a row while the circuit is open; in doubt only one, until its row has ended.

    While `circuit` is not in doubt, no turn is needed.

    A probe chosen earlier would say nothing: out of a hundred bad rows in sequence, the workers would hold the first.
    """

    def __init__(self, circuit: Breaker, loop: asyncio.AbstractEventLoop) -> None:
        self.circuit = circuit
        self._loop = loop
        self._waiters = Waiters()
        self._chosen = False

    @property
    def blocked_by(self) -> Binding | None:
        """What keeps a worker from choosing a row; None if it may."""
        if not self.circuit.in_doubt:
            return None
        return Binding(Limit.PROBING) if self._chosen else self.circuit.binding(self._loop.time())

    async def wait(self) -> bool:
        """Waits until the caller may choose a row; True if that row is the probe."""
        while (blocked_by := self.blocked_by) is not None:
            await self._waiters.wait(None if blocked_by.until_s is None else blocked_by.until_s - self._loop.time())
        if not self.circuit.in_doubt:
            return False
        self._chosen = True
        return True

    def end(self) -> None:
        """Ends the turn: the row was sent, or there was none."""
        self._chosen = False
        self.wake()

    def wake(self) -> None:
        """Lets waiting workers check again, if one of them may choose now."""
        if self._waiters and self.blocked_by is None:
            self._waiters.wake()
