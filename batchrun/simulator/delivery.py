"""Answers on the socket: whole, streamed, cut, or replaced by a fault."""

import asyncio
import socket
import struct

import msgspec
from aiohttp import web

from batchrun.simulator.faults import Fault
from batchrun.simulator.refusal import Refused

Headers = tuple[tuple[str, str], ...]
_LEAVE_POLL_S = 0.05  # any short time does: only the client's leaving is waited for
_JSON = "application/json"


class Delivery(msgspec.Struct, frozen=True):
    """An answer's bytes in pieces, `pause_s` apart. A stream is chunked."""

    content_type: str
    pieces: tuple[bytes, ...]
    streamed: bool = False
    pause_s: float = 0.0


async def deliver(http: web.BaseRequest, delivery: Delivery, headers: Headers) -> web.StreamResponse:
    """The whole answer was sent, unless the client left."""
    if not delivery.streamed:
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


async def cut(http: web.BaseRequest, delivery: Delivery, headers: Headers) -> web.StreamResponse:
    """Half of the answer was sent, then the connection closed."""
    whole = b"".join(delivery.pieces)
    response = await _start(http, delivery, headers)
    await response.write(whole[: len(whole) // 2])
    if http.transport is not None:
        http.transport.close()  # sends what was written, then FIN
    return response


async def replace(http: web.BaseRequest, fault: Fault, headers: Headers) -> web.StreamResponse:
    """The fault's own bytes were sent in place of an answer, or none were."""
    if (status := fault.http_status) is not None:
        if fault.kind == "body":
            body = fault.body_base64 or fault.body.encode()
        else:
            error_type = "server_error" if status >= 500 else "invalid_request_error"
            body = Refused(status, fault.message, code=fault.code, error_type=error_type).body()
        wait = () if fault.retry_after is None else (("Retry-After", fault.retry_after),)
        return answer(status, body, _JSON, headers + wait + fault.headers)
    if fault.kind == "hang":
        # aiohttp has no event for it short of cancelling
        while http.transport is not None and not http.transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(_LEAVE_POLL_S)
    elif http.transport is not None:
        # SO_LINGER 0 makes the close a reset, RST instead of FIN (socket(7))
        connection = http.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        http.transport.abort()
    return web.Response()  # no one gets it: the connection is closed


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
