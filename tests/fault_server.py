"""A raw TCP server on loopback whose script says, exchange by exchange, what goes wrong. It counts what it was sent."""

import asyncio
import base64
import contextlib
import json
import random
import re
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import quote

from tests.fast_clock import fast_clock
from tests.moved_clock import MovedClockLoop

NETWORK_S = 0.05
"""How long each exchange takes at least, on a moved clock: at no time at all, a thousand were refused at once."""

JITTER_SEED = 22
"""Of the runs on a moved clock. Only the order of rows that were committed at one moment is still the machine's."""

FINE = b'{"choices":[{"message":{"content":"Fine."},"finish_reason":"stop"}]}'


@dataclass
class Exchange:
    """One request as it arrived, whole, and the connection it came on. `place` counts from 0 on its connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: int
    place: int
    head: bytes
    body: bytes

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await self.writer.drain()

    async def silence(self) -> None:
        """Sends nothing until the client closes the connection."""
        await self.reader.read()

    def reset(self) -> None:
        """The connection ends with RST, not FIN."""
        opened = self.writer.get_extra_info("socket")
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Exchange], Awaitable[None]]


def sends(raw: bytes, *, then: Callable[[Exchange], Awaitable[None]] | None = None) -> Script:
    """Each request is answered with these bytes; `then` gets the connection next."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(raw)
        if then is not None:
            await then(exchange)

    return script


async def echo_key(exchange: Exchange) -> None:
    """Answers 422 with the key as it came, URL-encoded and in base64, as careless gateways do."""
    authorization = re.search(rb"(?i)^authorization: (.*)\r$", exchange.head, re.MULTILINE)
    assert authorization is not None
    key = authorization[1].removeprefix(b"Bearer ")
    forms = [authorization[1].decode(), quote(key, safe=""), base64.b64encode(key).decode()]
    error = {"error": {"message": f"Incorrect API key provided: {' '.join(forms)}", "code": "invalid_api_key"}}
    await exchange.send(answer(json.dumps(error).encode(), status="422 Unprocessable Entity"))


@dataclass
class FaultServer:
    """`exchanges` are the requests that were read to their last byte; `connections` counts what was accepted."""

    url: str = ""
    port: int = 0
    connections: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    new_loop: Callable[[], asyncio.AbstractEventLoop] = field(default_factory=lambda: fast_clock(10.0))
    """The loop of a run in this process: on the server's own clock, or a fast one beside it."""


@contextlib.asynccontextmanager
async def serving(
    script: Script, tls: ssl.SSLContext | None = None, served: FaultServer | None = None
) -> AsyncIterator[FaultServer]:
    """A server that runs `script` on every exchange. A script that closes the writer ends its connection.

    `served` counts; where it has a port already, the server listens there.
    """
    served = served or FaultServer()
    writers: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        connection = served.connections
        served.connections += 1
        # cancelled with its loop, it ends: the callback of asyncio's streams takes a cancelled one for a mistake
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            for place in range(1_000_000):
                head = await reader.readuntil(b"\r\n\r\n")
                exchange = Exchange(reader, writer, connection, place, head, await reader.readexactly(_length(head)))
                served.exchanges.append(exchange)
                await script(exchange)
                if writer.is_closing():
                    break
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", served.port, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    served.url = f"{'https' if tls else 'http'}://127.0.0.1:{served.port}/v1/chat/completions"
    try:
        yield served
    finally:
        server.close()
        for _ in range(3):  # also connections without a request, and those accepted a turn ago
            for writer in writers:
                writer.transport.abort()
            await asyncio.sleep(0)


@dataclass(frozen=True)
class Gap:
    """After so many requests the server is gone for a while, its open connections with it."""

    after_requests: int
    for_s: float
    hole: bool
    """Whether its port takes no connection meanwhile, instead of refusing each."""


@contextlib.contextmanager
def serving_moved(script: Script, tls: ssl.SSLContext | None = None, gap: Gap | None = None) -> Iterator[FaultServer]:
    """The same in each event loop that `new_loop` makes, for a whole run there: both live on its clock.

    The run's jitter is the same each time.
    """
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))  # not listening: without a loop, connections are refused
        port = reserved.getsockname()[1]
        served = FaultServer(f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1/chat/completions", port)
        tasks = []

        def new_loop() -> asyncio.AbstractEventLoop:
            random.seed(JITTER_SEED)
            loop = MovedClockLoop()
            tasks.append(loop.create_task(_serve(script, tls, gap, served)))
            return loop

        served.new_loop = new_loop
        yield served


async def _serve(script: Script, tls: ssl.SSLContext | None, gap: Gap | None, served: FaultServer) -> None:
    """Serves until the task is cancelled."""
    gone = asyncio.Event()

    async def counting(exchange: Exchange) -> None:
        if gap is not None and len(served.exchanges) == gap.after_requests:
            gone.set()
        await asyncio.sleep(NETWORK_S)
        await script(exchange)

    async with serving(counting, tls, served):
        await gone.wait()
    assert gap is not None
    with black_hole(served.port) if gap.hole else contextlib.nullcontext():
        await asyncio.sleep(gap.for_s)
    await _serve(script, tls, None, served)


@contextlib.contextmanager
def serving_aside(script: Script, tls: ssl.SSLContext | None = None) -> Iterator[FaultServer]:
    """The same in a thread of its own, beside a whole run in this one."""
    ready, ended = threading.Event(), asyncio.Event()
    served = FaultServer()

    async def main() -> None:
        async with serving(script, tls, served):
            ready.set()
            await ended.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield served
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@contextlib.contextmanager
def black_hole(port: int = 0) -> Iterator[int]:
    """The port of a listener that takes no connection: its queue is full, so that SYNs are dropped, not refused."""
    with socket.socket() as full, contextlib.ExitStack() as waiting:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", port))
        full.listen(0)
        for _ in range(4):
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield int(full.getsockname()[1])


def self_signed(folder: Path) -> Path:
    """A self-signed certificate for 127.0.0.1, and its key, in one file; alone it is `<file>.crt`."""
    file = folder / "pair.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-days", "2", "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, *names, "-keyout", file, "-out", f"{file}.crt"], check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.crt").read_text())
    return file


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def answer(body: bytes = FINE, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
    """The bytes of a whole response."""
    size = len(body) if length is None else length
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {size}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@cache
def gzip_bomb() -> bytes:
    """100 MB of zeros in 100 KB."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(bytes(1_000_000)) for _ in range(100)), packer.flush()])


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """The bytes of a response in chunks; without `end` it stays open."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if end else b"")
