"""One exchange while it is under way, and how long it may take.

A whole answer has a deadline. A stream has none while bytes come (but for `endpoint.stream_timeout_s`): it may be
silent for `endpoint.attempt_timeout_s` until its first token, since a model thinks before it writes, and for
`endpoint.idle_timeout_s` from then on.
"""

import time
from collections.abc import Collection, Mapping

import msgspec

from batchrun.errors import APIConnectionError
from batchrun.job.job import Endpoint
from batchrun.response.stream import Stream
from batchrun.transport.link import Link


class Exchange(msgspec.Struct, eq=False):
    """What is known of one exchange. `started_at` is wall time, the other moments are the monotonic clock's.

    `opened_at` is when its connection began to be made, `sent_at` when the connection stood; None: nothing was sent.
    `overdue` says why a sweep ended it, `unsent` that a part of the request has certainly not left.
    """

    started_at: float
    started: float
    link: Link | None = None
    opened_at: float | None = None
    sent_at: float | None = None
    unsent: bool = False
    overdue: str | None = None
    http_status: int | None = None
    headers: Mapping[str, str] = {}
    received: list[bytes] = []
    stream: Stream | None = None
    heard_at: float = 0.0
    first_token_at: float | None = None

    @property
    def is_writing(self) -> bool:
        """True while a good part of the request waits in this process for the server to read."""
        return self.link is not None and self.link.protocol.writing_paused

    def answered(self, error: APIConnectionError | None) -> bool | None:
        """Whether its connection brought an answer; None: it ended in a way that says nothing of the server."""
        if self.http_status is not None:
            return True
        return False if error is not None and error.kind in ("reset", "stale_connection") else None


class Deadlines(msgspec.Struct, frozen=True):
    """How long an exchange may take, in seconds."""

    whole_s: float
    idle_s: float
    stream_s: float

    @classmethod
    def of(cls, endpoint: Endpoint) -> "Deadlines":
        return cls(endpoint.attempt_timeout_s, endpoint.idle_timeout_s, endpoint.stream_timeout_s)

    def overdue(self, exchange: Exchange, now: float) -> str | None:
        """Why the exchange has taken too long, if it has."""
        if exchange.sent_at is None:
            return None
        age_s = now - exchange.sent_at
        if exchange.stream is None:
            return f"no whole answer within {self.whole_s:g} s" if age_s > self.whole_s else None
        patience_s = self.idle_s if exchange.stream.speaks else self.whole_s
        if now - exchange.heard_at > patience_s:
            return f"a stream that was silent for {patience_s:g} s"
        return f"a stream without its end after {self.stream_s:g} s" if age_s > self.stream_s else None

    def sweep(self, exchanges: Collection[Exchange]) -> int:
        """The connection of every exchange that has taken too long is ended; returns how many.

        One sweep a second costs less than a timeout object for each of a million requests (measured: 6 to 11 µs each),
        and ending the connection wakes whoever reads from it without cancelling a task.
        """
        now = time.monotonic()
        late = 0
        for exchange in tuple(exchanges):
            exchange.overdue = self.overdue(exchange, now)
            if exchange.overdue is not None and exchange.link is not None:
                late += 1
                exchange.link.abort()
        return late
