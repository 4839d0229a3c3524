"""The job's endpoints: each attempt goes to the one that its slot belongs to, with the key that its file holds now."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple

from batchrun.credentials import Credentials
from batchrun.dispatch.runlog import RunLog
from batchrun.limits.gates import AnyGate, Gates
from batchrun.records import Notice
from batchrun.transport.transport import Opened, Transport, Wanted

OpenTransports = Callable[[Wanted], AbstractAsyncContextManager[Sequence[Opened]]]
"""What opens the transports of a run: in this process (`transport.opened_here`) or elsewhere."""


class Connected(NamedTuple):
    """One endpoint with its open transport."""

    label: str
    transport: Transport
    credentials: Credentials


class Endpoints:
    """Sends attempts and replaces keys. One per run."""

    def __init__(self, connected: Sequence[Connected], gate: AnyGate, log: RunLog, note: Callable[[str], None]) -> None:
        self._connected = connected
        self._gates = gate if isinstance(gate, Gates) else None  # None: there is one endpoint
        self.log = log
        self._note = note

    def of(self, slot: int) -> Connected:
        """The endpoint that the slot belongs to."""
        return self._connected[0 if self._gates is None else self._gates.index_of(slot)]

    def was_key_replaced(self, slot: int, version: int) -> bool:
        """Whether the key was replaced since a request was sent. `version` is that of the credentials then."""
        index = 0 if self._gates is None else self._gates.index_of(slot)
        return self._refresh(index) or self._connected[index].credentials.version != version

    def expire(self) -> int:
        """As `Transport.expire`, for every endpoint."""
        return sum(each.transport.expire() for each in self._connected)

    def refresh_keys(self) -> None:
        """Uses the keys of files that were replaced; an endpoint that was set aside is tried again with its new key."""
        for index in range(len(self._connected)):
            self._refresh(index)

    def _refresh(self, index: int) -> bool:
        label, _, credentials = self._connected[index]
        if not credentials.refresh():
            return False
        self.log.write("key replaced", endpoint=label)
        line = f"{label}: the key file was replaced; the new key is used from now on"
        self._note(Notice(line, "key replaced", endpoint=label))
        if self._gates is not None and self._gates.restore(index, "a new key"):
            self.log.write("endpoint restored", endpoint=label, why="a new key")
        return True
