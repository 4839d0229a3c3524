"""Faults on the socket: an answer cut, delayed or replaced the way a real network and its gateways do it."""

import asyncio
import base64
import functools
import html
import socket
import struct
import zlib
from urllib.parse import quote

import msgspec
from aiohttp import web

from batchrun.simulator.faults import Fault
from batchrun.simulator.refusal import error_body

Headers = tuple[tuple[str, str], ...]
_BOMB_BYTES = 200_000_000  # gzips to 200 KB
_LEAVE_POLL_S = 0.05
_JSON = "application/json"
_HTML = "text/html; charset=utf-8"


class Delivery(msgspec.Struct, frozen=True):
    """An answer's bytes, in the pieces and at the pace they are sent. Chunked if it is a stream."""

    content_type: str
    pieces: tuple[bytes, ...]
    streamed: bool = False
    pause_s: float = 0.0


async def deliver(http: web.BaseRequest, delivery: Delivery, headers: Headers) -> web.StreamResponse:
    """The whole answer was sent, unless the client left."""
    if not delivery.streamed and delivery.pause_s == 0:
        return answer(200, b"".join(delivery.pieces), delivery.content_type, headers)
    response = await _start(http, delivery, headers)
    if delivery.pause_s == 0:
        await response.write(b"".join(delivery.pieces))
    else:
        for piece in delivery.pieces:
            await response.write(piece)
            await asyncio.sleep(delivery.pause_s)
    await response.write_eof()
    return response


async def spoil(http: web.BaseRequest, fault: Fault, delivery: Delivery, headers: Headers) -> web.StreamResponse:
    """The answer was worked out and sent, but for the fault."""
    whole = b"".join(delivery.pieces)
    match fault.kind:
        case "cut":
            response = await _start(http, delivery, headers)
            await response.write(whole[: len(whole) // 2])
            _close(http)
            return response
        case "slow_body":
            crawl = msgspec.structs.replace(delivery, pieces=_bytes_of(whole), pause_s=fault.pause_s)
            return await deliver(http, crawl, headers)
        case "close_after":
            response = await _start(http, delivery, headers)
            await response.write(whole)
            await response.write_eof()
            asyncio.get_running_loop().call_later(fault.pause_s, _close, http)
            return response
        case _:  # wrong_model and no_usage are in the bytes already
            return await deliver(http, delivery, headers)


async def replace(http: web.BaseRequest, fault: Fault, headers: Headers) -> web.StreamResponse:
    """The fault's own bytes went out instead of an answer, or none did."""
    match fault.kind:
        case "reset":
            await asyncio.sleep(fault.pause_s)
            _reset(http)
        case "hang":
            while not _has_left(http):  # noqa: ASYNC110  # aiohttp has no event for it short of cancelling
                await asyncio.sleep(_LEAVE_POLL_S)
        case "wire":
            await _send_raw(http, fault)
        case "gzip_bomb":
            bomb = await asyncio.to_thread(_bomb)
            return answer(200, bomb, _JSON, (*headers, ("Content-Encoding", "gzip")))
        case _:
            body, content_type = _body(http, fault)
            return answer(fault.http_status, body, content_type, headers + _extra_headers(fault))
    return web.Response()  # reaches nobody: the connection is gone


def answer(status: int, body: bytes, content_type: str, headers: Headers) -> web.Response:
    """A whole response; headers may repeat."""
    response = web.Response(status=status, body=body)
    response.headers["Content-Type"] = content_type
    for name, text in headers:
        response.headers.add(name, text)
    return response


async def _start(http: web.BaseRequest, delivery: Delivery, headers: Headers) -> web.StreamResponse:
    response = web.StreamResponse()
    response.headers["Content-Type"] = delivery.content_type
    if not delivery.streamed:
        response.content_length = sum(map(len, delivery.pieces))
    for name, text in headers:
        response.headers.add(name, text)
    await response.prepare(http)
    return response


def _body(http: web.BaseRequest, fault: Fault) -> tuple[bytes, str]:
    """What stands in for the answer, and its content type."""
    match fault.kind:
        case "body":
            return fault.payload, _JSON
        case "garbage":
            return _page(200, "Welcome"), _HTML
        case "echo_key":
            return _echo(http.headers.get("Authorization", ""), fault), _JSON
    if fault.empty:
        return b"", _JSON
    if fault.html:
        return _page(fault.http_status, fault.message), _HTML
    return _error(fault.message, fault), _JSON


def _error(message: str, fault: Fault) -> bytes:
    error_type = "server_error" if fault.http_status >= 500 else "invalid_request_error"
    return error_body(message, error_type=error_type, code=fault.code)


def _echo(authorization: str, fault: Fault) -> bytes:
    """An error that gives the key away in three writings, as careless gateways do."""
    key = authorization.removeprefix("Bearer ")
    encoded = base64.b64encode(key.encode()).decode()
    return _error(f"Incorrect API key provided: {authorization} ({quote(key, safe='')}, {encoded})", fault)


def _page(status: int, message: str) -> bytes:
    text = html.escape(message)
    return f"<html><head><title>{status}</title></head><body><h1>{text}</h1></body></html>".encode()


def _extra_headers(fault: Fault) -> Headers:
    named = (("Retry-After", fault.retry_after), ("retry-after-ms", fault.retry_after_ms))
    given = tuple((name, text) for name, text in named if text is not None)
    location = (("Location", fault.location),) if fault.location else ()
    return given + location + fault.headers


async def _send_raw(http: web.BaseRequest, fault: Fault) -> None:
    """The fault's bytes are the whole response, status line and all; then the connection ends."""
    for piece in _bytes_of(fault.payload) if fault.pause_s else (fault.payload,):
        if http.transport is None:
            return
        http.transport.write(piece)
        await asyncio.sleep(fault.pause_s)
    _close(http)


def _bytes_of(whole: bytes) -> tuple[bytes, ...]:
    return tuple(whole[index : index + 1] for index in range(len(whole)))


def _has_left(http: web.BaseRequest) -> bool:
    return http.transport is None or http.transport.is_closing()


def _close(http: web.BaseRequest) -> None:
    """What was written is sent, then FIN."""
    if http.transport is not None:
        http.transport.close()


def _reset(http: web.BaseRequest) -> None:
    """RST instead of FIN: the socket is told not to linger (SO_LINGER 0, socket(7)) before it is closed."""
    if http.transport is not None:
        connection = http.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        http.transport.abort()


@functools.cache
def _bomb() -> bytes:
    """200 KB of gzip that unpacks to 200 MB of spaces."""
    press = zlib.compressobj(wbits=31)
    block = b" " * 1_000_000
    return b"".join(press.compress(block) for _ in range(_BOMB_BYTES // len(block))) + press.flush()
