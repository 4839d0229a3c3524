"""A server that gives every request the same small answer at once: a target that is never the bottleneck.

python benchmarks/fixed_answer.py [PEM]  # prints its URL, serves until killed; over TLS with certificate and key in PEM

After a SIGUSR1 it prints the time (seconds since the epoch) at which the next request arrives.
"""

import asyncio
import signal
import ssl
import sys
import time
from typing import cast

import msgspec

ANSWER = msgspec.json.encode(
    {
        "id": "chatcmpl-fixed",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "vtrix-gpt-5.3-codex",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "A plain sentence of about ten words, as answers go."},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 40, "completion_tokens": 12, "total_tokens": 52},
    }
)
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nx-request-id: req-fixed\r\nContent-Length: "
    + str(len(ANSWER)).encode()
    + b"\r\n\r\n"
    + ANSWER
)


class FixedAnswer(asyncio.Protocol):
    """One connection: counts whole requests by their Content-Length and answers each."""

    prints_next = False

    def __init__(self) -> None:
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports only look like one

    def data_received(self, data: bytes) -> None:
        if FixedAnswer.prints_next:
            FixedAnswer.prints_next = False
            print(time.time(), flush=True)
        self._buffer += data
        while (head := self._buffer.find(b"\r\n\r\n")) >= 0:
            start = self._buffer.lower().find(b"content-length:", 0, head)
            length = int(self._buffer[start + 15 : self._buffer.find(b"\r\n", start)]) if start >= 0 else 0
            if len(self._buffer) < head + 4 + length:
                return
            self._buffer = self._buffer[head + 4 + length :]
            self._transport.write(RESPONSE)


async def main() -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    loop.add_signal_handler(signal.SIGUSR1, setattr, FixedAnswer, "prints_next", True)
    tls = None
    if len(sys.argv) > 1:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[1])
    server = await loop.create_server(FixedAnswer, "127.0.0.1", 0, ssl=tls)
    print(f"{'https' if tls else 'http'}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await ended.wait()


if __name__ == "__main__":
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
