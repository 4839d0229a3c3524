"""Memory and CPU of many long streams at once, read by batchrun's transport from a server process on this machine.

    python benchmarks/streams.py 64 5000000      # streams at once, bytes of each; about ten seconds

Prints one JSON line: what the reading process's resident set grew to above its start (peak), its CPU per stream to
receive it and to read it when it has ended, and what the stored answers take together.
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
DELTA = (
    b'data: {"id":"chatcmpl-9f1c","object":"chat.completion.chunk","created":1795000000,"model":"vtrix-gpt-5.3-codex",'
    b'"choices":[{"index":0,"delta":{"content":" %06d"},"finish_reason":null}]}\n\n'
)
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
PIECE_BYTES = 20_000


async def serve(size: int) -> None:
    """Answers every connection with a stream of `size` bytes, in pieces that all connections take turns at."""
    piece = b"".join(DELTA % number for number in range(PIECE_BYTES // len(DELTA % 0)))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(HEAD)
            for _ in range(size // len(piece)):
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(STOP)
            await writer.drain()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def read(port: int, streams: int) -> dict[str, float]:
    from batchrun.credentials import Credentials
    from batchrun.job.settings import Endpoint
    from batchrun.response import answer
    from batchrun.transport.transport import choose, opened

    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    key = "sk-bench-8d1f3b7a"
    credentials = Credentials({"Authorization": f"Bearer {key}"}, frozenset({key}))
    endpoint = Endpoint(url, api_key_env="KEY")
    async with opened(choose(endpoint), url, endpoint, credentials) as transport:
        before_kb, cpu_s, started = memory_kb("VmRSS"), time.process_time(), time.monotonic()
        attempts = await asyncio.gather(*(transport.send(b"{}", "bench") for _ in range(streams)))
        elapsed_s, cpu_s = time.monotonic() - started, time.process_time() - cpu_s
        grown_kb = memory_kb("VmHWM") - before_kb
    assert all(attempt.error is None for attempt in attempts)
    read_at, answers = time.process_time(), [answer.parse(attempt.body) for attempt in attempts[:8]]
    read_ms = (time.process_time() - read_at) / len(answers) * 1000
    assert all(each.completion for each in answers)
    return {
        "streams": streams,
        "seconds": round(elapsed_s, 2),
        "cpu_ms_per_stream": round(cpu_s / streams * 1000, 1),
        "read_ms_per_stream": round(read_ms, 1),
        "grown_mb": round(grown_kb / 1000, 1),
        "stored_mb": round(sum(len(attempt.body) for attempt in attempts) / 1e6, 2),
    }


def memory_kb(name: str) -> int:
    """A figure of this process's own memory. (getrusage's peak begins with that of the process that started it.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    if sys.argv[1] == "--serve":
        asyncio.run(serve(int(sys.argv[2])))
        return
    streams, size = int(sys.argv[1]), int(sys.argv[2])
    server = subprocess.Popen([sys.executable, HERE, "--serve", str(size)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        figures = asyncio.run(read(int(server.stdout.readline()), streams))
    finally:
        server.kill()
        server.wait()
    print(json.dumps({"mb_each": size / 1e6, **figures}))


if __name__ == "__main__":
    main()
