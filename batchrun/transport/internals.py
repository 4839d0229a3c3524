"""aiohttp internals that the lean transport relies on, and a self-test that detects a version without them.

Not in aiohttp's reference, so any version may change them:

- `TCPConnector.connect(request, traces, timeout)` returns a `Connection` of a `ResponseHandler`, made by `_factory`.
- `ResponseHandler.set_response_params` sets the parser up, and one parser reads any number of responses in sequence
  (aiohttp's server uses its parser that way).
- `ResponseHandler.read` waits for the next head; `should_close` is true once the connection can't carry another.
- `StreamReader._buffer` holds what of a body arrived and was not read, also after its end or that of its connection.

The request that gives the connector its target, and whose headers all requests share, is passed to client middlewares:
that much is documented.
"""

import asyncio
import inspect
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest

from batchrun.transport.link import Protocol

TESTED_WITH = ("3.14.5",)
"""Versions that tests/run/test_transport.py ran with. With any version, the self-test runs at the start of a run."""

READ_BUFFER_BYTES = 65_536
"""How much of a body may be buffered; at twice that, aiohttp stops reading from the socket."""

T = TypeVar("T")


class _Captured(Exception):
    """Not an error: takes a request out of a middleware without sending it."""

    def __init__(self, request: ClientRequest) -> None:
        self.request = request


async def request_of(session: aiohttp.ClientSession, url: str) -> ClientRequest:
    """The request that the session would send, without a body.

    Raises:
        aiohttp.InvalidURL: the URL is invalid.
    """

    async def capture(request: ClientRequest, _: object) -> NoReturn:
        raise _Captured(request)

    try:
        await session.post(url, data=b"", middlewares=(capture,))
    except _Captured as captured:
        return captured.request
    raise AssertionError("a request passed its middleware")


def head_of(request: ClientRequest) -> bytes:
    """The request line and the headers that all requests share.

    Raises:
        ValueError: a header contains a line end.
    """
    lines = [f"{request.method} {request.url.raw_path_qs} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in request.headers.items() if name.lower() != "content-length"]
    if any("\r" in line or "\n" in line or "\0" in line for line in lines):
        raise ValueError("a header contains a line end")
    return "".join(f"{line}\r\n" for line in lines).encode()


def start_parsing(protocol: ResponseHandler) -> None:
    """Lets the protocol parse responses until its connection ends."""
    protocol.set_response_params(
        read_until_eof=True, auto_decompress=False, read_bufsize=READ_BUFFER_BYTES, read_timeout=None
    )


def lacking(loop: asyncio.AbstractEventLoop) -> str | None:
    """What this aiohttp version lacks; None: the lean transport can be used."""
    try:
        _rehearse(loop)
    except Exception as error:  # any kind: the session transport needs none of this
        return f"{type(error).__name__}: {error}"
    return None


def _rehearse(loop: asyncio.AbstractEventLoop) -> None:
    """Parses a few responses without a socket. Takes about 0.3 ms."""
    parameters = list(inspect.signature(aiohttp.TCPConnector.connect).parameters)
    _expect(parameters == ["self", "req", "traces", "timeout"], "TCPConnector.connect has other parameters")
    factory = aiohttp.TCPConnector()._factory
    _expect(factory.func is ResponseHandler, "TCPConnector makes other protocols")
    protocol = Protocol(loop)
    protocol.connection_made(_Nowhere())
    start_parsing(protocol)
    protocol.data_received(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nX-A: b\r\nContent-Length: 2\r\n\r\nab")
    _expect(_now(protocol.read())[0].code == 103, "an interim answer is not read")
    message, content = _now(protocol.read())
    _expect((message.code, message.headers["x-a"], content.is_eof()) == (200, "b", True), "an answer is not read")
    _expect(list(content._buffer) == [b"ab"] and content._buffer_offset == 0, "a body is not kept")
    _expect(_now(content.readany()) == b"ab" and content.at_eof(), "a body is not read")
    _expect(not protocol.should_close, "a connection can't be used again")
    protocol.data_received(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nc\r\n")
    message, content = _now(protocol.read())
    _expect((message.code, list(content._buffer)) == (500, [b"c"]), "a second answer is not read")
    _expect(protocol.should_close, "a connection may be used again before its answer has ended")
    protocol.data_received(b"0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    _expect(content.is_eof() and protocol.should_close, "an answer to nothing is not noticed")


def _expect(true: bool, otherwise: str) -> None:
    if not true:
        raise RuntimeError(otherwise)


def _now(call: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must not wait."""
    try:
        call.send(None)
    except StopIteration as returned:
        result: T = returned.value
        return result
    call.close()
    raise RuntimeError("it waits for more")


class _Nowhere(asyncio.Transport):
    """A connection without a socket."""

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass
