"""Tells a connection closed while idle from one lost after the server got the request. PURE.

A server may close a kept connection at any moment. If it does so while our request is in transit, we see the same as
when it read, served and billed the request and then dropped the connection. Three rules tell the two apart:

- A connection whose end is visible before the write is not used.
- A server that closes every connection after its answer is detected without risk: until one connection has carried a
  second request, one at a time is tried, after it was idle for `SETTLING_S`.
- A connection that ends without a byte after the write counts as closed while idle only if it had been idle for
  `STALE_IDLE_S` and ended within two round trips. Any other is in doubt. (Measured: a server that billed and reset
  after 50 ms was taken for one that had closed an idle connection; 21 of 27 such attempts went unnamed.)
"""

import msgspec

STALE_IDLE_S = 1.0
"""Servers close idle connections no sooner than this."""

STALE_ROUND_TRIPS = 2
"""A closed socket, or a NAT that forgot the flow, responds in one; the second is slack for a busy event loop."""

SETTLING_S = 0.05
"""A server that closes connections after its answer has done so by then, and its FIN has arrived."""

TRIAL_S = 0.1
"""How long exchanges that have other connections wait for the end of a trial before they open new ones, which takes
about as long over TLS to a far server. Without the wait, twelve requests at once to a fast server opened up to 148
connections (measured)."""

UNKEPT_S = 60.0
"""How long a server that closes connections gets a new one for each request before one is tried again."""

DROPPED_IN_A_ROW = 2
"""So many reused connections in a row that end without a byte put keep-alive in question again."""


class Loss(msgspec.Struct, frozen=True):
    """The state of an exchange whose connection ended before the head of a response.

    `idle_s` is how long the connection was idle before; None: this was its first request. `ended_after_s` counts from
    the write. `round_trip_s` is infinite if none was measured. `heard_bytes` is what arrived since the write; None if
    not counted. `unsent`: a part of the request has certainly not left this process.
    """

    idle_s: float | None
    ended_after_s: float
    round_trip_s: float
    heard_bytes: int | None
    unsent: bool


def kind_of(loss: Loss) -> str:
    """The error kind of such an end: `stale_connection` and `lost_before_send` were certainly not served."""
    if loss.unsent:
        return "lost_before_send"  # a server that did not get all of the JSON can't have answered it
    was_idle = loss.idle_s is not None and loss.idle_s >= STALE_IDLE_S
    in_time = loss.ended_after_s <= STALE_ROUND_TRIPS * loss.round_trip_s
    if was_idle and loss.heard_bytes == 0 and in_time:
        return "stale_connection"
    return "reset"


class KeepAlive:
    """Whether a server keeps connections open. Connections are compared by identity only.

    `proven`: one of them carried a second request. `is_certain`: and nothing is in question, so another answer changes
    nothing.
    """

    def __init__(self) -> None:
        self.proven = self.is_certain = False
        self._dropped = 0
        self._trial: object = None
        self._not_before_s = 0.0

    @property
    def is_trying(self) -> bool:
        """True while a connection is on trial."""
        return self._trial is not None

    def may_try(self, now_s: float) -> bool:
        """True if a connection may be reused to test whether the server keeps it open."""
        return self._trial is None and now_s >= self._not_before_s

    def start_trial(self, connection: object) -> None:
        """Puts the connection on trial."""
        self._trial = connection

    def close(self, connection: object, now_s: float) -> None:
        """The server closed the connection while nothing was at risk."""
        if self._trial is connection:
            self._trial = None
            self._not_before_s = now_s + UNKEPT_S

    def end(self, connection: object, now_s: float, *, reused: bool, answered: bool | None) -> None:
        """An exchange ended: with an answer, without a byte, or (None) in a way that says nothing about the server."""
        on_trial = self._trial is connection
        if on_trial:
            self._trial = None
        if not reused or answered is None:
            return
        if answered:
            self.proven, self._dropped = True, 0
            self.is_certain = self._trial is None
            return
        self.is_certain = False
        self._dropped += 1
        if on_trial or self._dropped >= DROPPED_IN_A_ROW:
            self.proven, self._dropped = False, 0
            self._not_before_s = now_s + UNKEPT_S
