"""One connection below both wires: aiohttp's protocol with a count of bytes, and what is known of its use."""

import select
from typing import Optional

import aiohttp
from aiohttp.client_proto import ResponseHandler


class Protocol(ResponseHandler):
    """aiohttp's protocol of one connection. `heard_bytes` counts what has come on it, parsed or not."""

    heard_bytes = 0
    link: Optional["Link"] = None

    def data_received(self, data: bytes) -> None:
        self.heard_bytes += len(data)
        super().data_received(data)

    def resume_reading(self, resume_parser: bool = True) -> None:
        """As aiohttp's, but for the parser's walk over nothing that follows each read of a body that never paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)


class Link:
    """One connection, from when it stands to its end.

    `idle_s` is how long it was unused before the exchange at hand; None: it is its first. `free_since` is when its last
    exchange ended, on the monotonic clock; None while that is not known. `connection` is aiohttp's lease of it.
    """

    __slots__ = ("_heard_before", "_look", "connection", "free_since", "idle_s", "protocol", "transport")

    def __init__(self, connection: aiohttp.connector.Connection, protocol: ResponseHandler) -> None:
        assert protocol.transport is not None
        self.connection = connection
        self.protocol = protocol
        self.transport = protocol.transport
        self.idle_s: float | None = None
        self.free_since: float | None = None
        self._heard_before = 0
        self._look = select.poll()
        self._look.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)

    @property
    def reused(self) -> bool:
        return self.idle_s is not None

    def begin_next(self, now_s: float) -> None:
        """The exchange at hand is another one."""
        self.idle_s = 0.0 if self.free_since is None else now_s - self.free_since
        self.free_since = None
        self._heard_before = self.protocol.heard_bytes if isinstance(self.protocol, Protocol) else 0

    @property
    def heard_bytes(self) -> int | None:
        """What has come since the exchange began; None where aiohttp made a protocol that does not count."""
        return self.protocol.heard_bytes - self._heard_before if isinstance(self.protocol, Protocol) else None

    def is_over(self) -> bool:
        """True where the connection can't carry another request.

        It was closed, or the server has sent something unrequested, or one of these lies in the kernel and the event
        loop has not come to see it yet: nothing is due on an idle connection. Then nothing was sent, and nothing
        depends on time.
        """
        return not self.protocol.is_connected() or self.protocol.should_close or bool(self._look.poll(0))

    def abort(self) -> None:
        """The connection ends now, without waiting for what is still to be written; its reader is woken."""
        self.transport.abort()
