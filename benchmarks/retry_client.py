"""The simplest client there is: so many at once, and a refused row again after its own wait. It never slows down.

Where refusals are chance nothing is faster, so its time is the ideal that benchmarks/limits.py compares with.

    python benchmarks/retry_client.py URL rows in_flight
"""

import asyncio
import json
import sys

import aiohttp

DEFAULT_WAIT_S = 0.3
"""The wait of a refused row without a Retry-After."""


async def main(url: str, rows: int, in_flight: int) -> None:
    left = iter(range(rows))

    async def work(session: aiohttp.ClientSession) -> None:
        for row in left:
            await send(session, row)

    async def send(session: aiohttp.ClientSession, row: int) -> None:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": f"row {row}"}], "max_tokens": 40})
        headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
        async with session.post(f"{url}/chat/completions", data=body, headers=headers) as response:
            await response.read()
            wait_s = float(response.headers.get("Retry-After", DEFAULT_WAIT_S))
        if response.status not in (200, 429):
            raise SystemExit(f"HTTP {response.status}")
        if response.status == 429:
            waiting.add(asyncio.create_task(again(session, row, wait_s)))

    async def again(session: aiohttp.ClientSession, row: int, wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        async with slots:
            await send(session, row)

    waiting = set[asyncio.Task[None]]()
    slots = asyncio.Semaphore(in_flight)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=in_flight)) as session:
        await asyncio.gather(*(work(session) for _ in range(in_flight)))
        while waiting:
            await waiting.pop()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
