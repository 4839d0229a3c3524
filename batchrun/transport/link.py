"""One connection as both transports see it: aiohttp's protocol with a byte count, and its history."""

import select
from typing import Optional

import aiohttp
from aiohttp.client_proto import ResponseHandler


class Protocol(ResponseHandler):
    """aiohttp's protocol of one connection. `heard_bytes` counts the bytes received, parsed or not."""

    heard_bytes = 0
    link: Optional["Link"] = None

    def data_received(self, data: bytes) -> None:
        self.heard_bytes += len(data)
        ResponseHandler.data_received(self, data)  # `super()` costs as much as the rest of this method

    def resume_reading(self, resume_parser: bool = True) -> None:
        """As in aiohttp, but skips its parser call after each read of a body that never paused."""
        if self._reading_paused:
            super().resume_reading(resume_parser)


class Link:
    """One established connection.

    `idle_s` is how long it was idle before the present exchange; None: it is its first. `free_since` is when its last
    exchange ended, on the monotonic clock; None if unknown. `connection` is aiohttp's lease of it.
    """

    __slots__ = ("_counted", "_heard_before", "_look", "connection", "free_since", "idle_s", "protocol", "transport")

    def __init__(self, connection: aiohttp.connector.Connection, protocol: ResponseHandler) -> None:
        assert protocol.transport is not None
        self.connection = connection
        self.protocol = protocol
        self.transport = protocol.transport
        self.idle_s: float | None = None
        self.free_since: float | None = None
        self._counted = protocol if isinstance(protocol, Protocol) else None
        self._heard_before = 0
        self._look = select.poll()
        self._look.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)

    def rest(self, now_s: float | None) -> None:
        """The exchange has ended. None: the end of its response has not come yet."""
        self.free_since = now_s
        if self._counted is not None:
            self._heard_before = -1 if now_s is None else self._counted.heard_bytes

    def begin_next(self, now_s: float) -> None:
        """Starts the next exchange on this link."""
        self.idle_s = 0.0 if self.free_since is None else now_s - self.free_since
        self.free_since = None
        if self._counted is not None:
            self._heard_before = self._counted.heard_bytes

    @property
    def heard_bytes(self) -> int | None:
        """Bytes received in this exchange; None if aiohttp's protocol does not count them."""
        return None if self._counted is None else self._counted.heard_bytes - self._heard_before

    def is_over(self) -> bool:
        """True if the connection can't carry another request.

        It was closed, or the server sent something unexpected, or either is in the kernel and the event loop has not
        seen it yet: an idle connection has nothing to receive. Then nothing was sent yet.
        """
        if self.transport.is_closing() or self._look.poll(0):
            return True
        # as it was put to rest, it could carry another: only what it heard since can change that
        is_unchanged = self._counted is not None and self._counted.heard_bytes == self._heard_before
        return not is_unchanged and self.protocol.should_close

    def abort(self) -> None:
        """Ends the connection now, without flushing; its reader is woken."""
        self.transport.abort()
