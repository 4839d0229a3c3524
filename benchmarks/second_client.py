"""Another client on the same key: asks at a steady pace, and obeys nothing but a 429's Retry-After.

python benchmarks/second_client.py URL REQUESTS_PER_MINUTE        # until killed
"""

import asyncio
import signal
import sys

import aiohttp
import msgspec


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> float:
    """One request was answered; the seconds to stay away for, 0 unless it was refused."""
    question = {"role": "user", "content": f"second client {number} " + "word " * 60}
    body = msgspec.json.encode({"model": "vtrix-gpt-5.3-codex", "messages": [question], "max_tokens": 40})
    async with session.post(f"{url}/chat/completions", data=body) as response:
        await response.read()
        return float(response.headers["Retry-After"]) if response.status == 429 else 0.0


async def main(url: str, requests_per_minute: float) -> None:
    """Asks until SIGTERM; what would have been sent while it stays away is not made up for."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    headers = {"Authorization": "Bearer bench-key-000000", "Content-Type": "application/json"}
    flying: set[asyncio.Task[float]] = set()
    away_until_s, number = 0.0, 0

    def answered(task: "asyncio.Task[float]") -> None:
        nonlocal away_until_s
        flying.discard(task)
        away_until_s = max(away_until_s, loop.time() + task.result())

    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        started_s = loop.time()
        while not ended.is_set():
            number += 1
            await asyncio.sleep(started_s + number * 60 / requests_per_minute - loop.time())
            if loop.time() >= away_until_s:
                task = asyncio.create_task(ask(session, url, number))
                flying.add(task)
                task.add_done_callback(answered)
        for task in flying:
            task.remove_done_callback(answered)
            task.cancel()
        await asyncio.gather(*flying, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
