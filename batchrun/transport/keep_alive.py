"""What the end of a connection can mean, and what a server shows of keeping connections open. PURE.

A server may close a connection that it keeps open for us at any moment. If it does so while our request is on its way,
we see the same as when it has read, served and billed the request and then dropped the connection. Three rules keep the
two apart:

- A connection whose end can be seen before the write is not used.
- A server that closes each connection behind its answer is found out before anything is at stake: until one connection
  has carried a second request, one at a time is tried, after it was idle for `SETTLING_S`.
- What ends without a byte after the write is taken for closed while idle only if it had been idle for `STALE_IDLE_S`
  and ended within two round trips. Everything else is in doubt. (Measured: a server that billed and reset after 50 ms
  was taken for one that had closed an idle connection; 21 of 27 such doubts had no name.)
"""

import msgspec

STALE_IDLE_S = 1.0
"""No server closes a connection for idleness sooner."""

STALE_ROUND_TRIPS = 2
"""The answer of a closed socket, or of a NAT that forgot the flow, takes one; the second is for a busy event loop."""

SETTLING_S = 0.05
"""A server that closes a connection behind its answer has done so by then, and its FIN has arrived."""

UNKEPT_S = 60.0
"""How long a server that closes connections gets a fresh one for each request before one is tried again."""

DROPPED_IN_A_ROW = 2
"""So many reused connections that end without a byte, none answered between, put keep-alive in question again."""


class Loss(msgspec.Struct, frozen=True):
    """How an exchange stood when its connection ended before the head of an answer.

    `idle_s` is how long the connection was unused before; None: this was its first request. `ended_after_s` counts from
    the write. `round_trip_s` is infinite while none was measured. `heard_bytes` is what had come since the write; None
    where bytes were not counted. `unsent`: a part of the request has certainly not left this process.
    """

    idle_s: float | None
    ended_after_s: float
    round_trip_s: float
    heard_bytes: int | None
    unsent: bool


def kind_of(loss: Loss) -> str:
    """What such an end is called: `stale_connection` and `lost_before_send` were certainly not served."""
    if loss.unsent:
        return "lost_before_send"  # a server that has not seen the end of the JSON can't have answered it
    was_idle = loss.idle_s is not None and loss.idle_s >= STALE_IDLE_S
    in_time = loss.ended_after_s <= STALE_ROUND_TRIPS * loss.round_trip_s
    if was_idle and loss.heard_bytes == 0 and in_time:
        return "stale_connection"
    return "reset"


class KeepAlive:
    """What a server has shown of keeping connections open. Connections are distinguished by identity alone."""

    def __init__(self) -> None:
        self.proven = False
        self._dropped = 0
        self._trial: object = None
        self._not_before_s = 0.0

    def may_try(self, now_s: float) -> bool:
        """True where a connection may be used again to see whether the server keeps it open."""
        return self._trial is None and now_s >= self._not_before_s

    def try_(self, connection: object) -> None:
        """The connection is the one on trial."""
        self._trial = connection

    def close(self, connection: object, now_s: float) -> None:
        """The server has closed the connection while nothing was at stake."""
        if self._trial is connection:
            self._trial = None
            self._not_before_s = now_s + UNKEPT_S

    def end(self, connection: object, now_s: float, *, reused: bool, answered: bool | None) -> None:
        """An exchange has ended: with an answer, without a byte, or (None) in a way that says nothing of the server."""
        on_trial = self._trial is connection
        if on_trial:
            self._trial = None
        if not reused or answered is None:
            return
        if answered:
            self.proven, self._dropped = True, 0
            return
        self._dropped += 1
        if on_trial or self._dropped >= DROPPED_IN_A_ROW:
            self.proven, self._dropped = False, 0
            self._not_before_s = now_s + UNKEPT_S
