"""What one request costs on each wire, in CPU of the client's process, beside a bare loop of `session.post`.

    python benchmarks/wire.py                     # 30,000 requests, three rounds, plain HTTP and TLS; about two minutes
    python benchmarks/wire.py --instructions      # instructions instead of time, by valgrind; about five minutes

64 in flight, bodies of 1 KB, answers of 0.4 KB, a server process on the same machine (`fixed_answer.py`). Prints the
median of the rounds, microseconds of user and of system time, and the ratio to the bare loop on uvloop. Time to connect
and to import is not in it. CPU time and ratios are what to trust: other work on the machine changes the rest.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from tests.fault_server import self_signed as self_signed  # `row` takes it from here

HERE = Path(__file__).resolve()
IN_FLIGHT = 64
WARM = 2 * IN_FLIGHT
"""Requests before the count begins: they make the connections."""

BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"word " * 190 + b'"}],"max_tokens":128}'
KEY = "sk-bench-8d1f3b7a"

VARIANTS = ("bare asyncio", "bare uvloop", "session asyncio", "session uvloop", "lean asyncio", "lean uvloop")


async def bare(url: str, ca_file: str | None, drive: Callable[[Callable[[], Awaitable[Any]]], Awaitable[None]]) -> None:
    """What an honest script does."""
    import ssl

    import aiohttp

    tls = ssl.create_default_context(cafile=ca_file)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=tls)) as session:

        async def once() -> None:
            async with session.post(url, data=BODY, headers=headers) as response:
                assert response.status == 200
                await response.read()

        await drive(once)


async def ours(
    wire: str, url: str, ca_file: str | None, drive: Callable[[Callable[[], Awaitable[Any]]], Awaitable[None]]
) -> None:
    """One of batchrun's wires, with its whole contract."""
    from batchrun.credentials import Credentials
    from batchrun.job.settings import Endpoint
    from batchrun.transport.transport import Choice, opened

    credentials = Credentials({"Authorization": f"Bearer {KEY}"}, frozenset({KEY}))
    endpoint = Endpoint(url, api_key_env="KEY", ca_file=ca_file)
    choice = Choice("lean" if wire == "lean" else "session", "the benchmark asks for it")
    async with opened(choice, url, endpoint, credentials) as transport:

        async def once() -> None:
            attempt = await transport.send(BODY, "2c6a482e2446-41-1")
            assert attempt.http_status == 200

        await drive(once)


def measure(variant: str, url: str, ca_file: str | None, requests: int) -> dict[str, float]:
    """Microseconds a request, in this process."""
    used: list[tuple[float, float, float]] = []

    async def drive(once: Callable[[], Awaitable[Any]]) -> None:
        for count in (WARM, requests):
            left = iter(range(count))

            async def work(left: Iterator[int] = left) -> None:
                for _ in left:
                    await once()

            if count == requests:
                used.append(_used())
            await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        used.append(_used())

    wire, _, loop = variant.partition(" ")
    main = bare(url, ca_file, drive) if wire == "bare" else ours(wire, url, ca_file, drive)
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        runner.run(main)
    before, after = used
    user, system, wall = (1e6 * (end - start) / requests for start, end in zip(before, after, strict=True))
    return {"user": user, "system": system, "wall": wall}


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if name == "asyncio":
        return None
    import uvloop

    return uvloop.new_event_loop


def _used() -> tuple[float, float, float]:
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime, now.ru_stime, time.perf_counter()


@contextlib.contextmanager
def server(certificate: Path | None) -> Iterator[str]:
    """The URL of a server that answers at once, until the block ends."""
    command = [sys.executable, str(HERE.with_name("fixed_answer.py")), *([str(certificate)] if certificate else [])]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        yield f"{started.stdout.readline().strip()}/chat/completions"
    finally:
        started.terminate()
        started.wait()


def in_process(variant: str, url: str, ca_file: str | None, requests: int) -> dict[str, float]:
    """`measure` in a process of its own: the variants share no warmed caches."""
    command = [sys.executable, str(HERE), "--one", variant, url, ca_file or "", str(requests)]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def instructions(variant: str, url: str, ca_file: str | None) -> float:
    """Thousands of instructions a request: the slope between two runs, so that neither imports nor connects count."""
    counts = []
    for requests in (200, 700):
        command = [sys.executable, str(HERE), "--one", variant, url, ca_file or "", str(requests)]
        callgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
        environ = {**os.environ, "PYTHONHASHSEED": "0"}
        run = subprocess.run([*callgrind, *command], check=True, capture_output=True, text=True, env=environ)
        found = re.search(r"Collected : (\d+)", run.stderr)
        assert found is not None
        counts.append(int(found[1]))
    return (counts[1] - counts[0]) / 500 / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="variants whose name holds this")
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("VARIANT", "URL", "CA_FILE", "REQUESTS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        variant, url, ca_file, requests = given.one
        print(json.dumps(measure(variant, url, ca_file or None, int(requests))))
        return
    variants = [variant for variant in VARIANTS if given.only in variant]
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-") as folder:
        for certificate in (None, self_signed(Path(folder))):
            ca_file = f"{certificate}.crt" if certificate else None
            print("TLS" if certificate else "plain HTTP", flush=True)
            with server(certificate) as url:
                if given.instructions:
                    for variant in variants:
                        print(f"  {variant:16} {instructions(variant, url, ca_file):7.1f} k instructions", flush=True)
                else:
                    compare(variants, url, ca_file, given.requests, given.rounds)


def compare(variants: list[str], url: str, ca_file: str | None, requests: int, rounds: int) -> None:
    """Prints the medians. The variants take turns, so that a slow minute of the machine meets them all."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            found[variant].append(in_process(variant, url, ca_file, requests))
    of = {
        variant: {name: statistics.median(one[name] for one in taken) for name in ("user", "system", "wall")}
        for variant, taken in found.items()
    }
    floor = of.get("bare uvloop")
    for variant, cost in of.items():
        cpu = cost["user"] + cost["system"]
        ratio = "" if floor is None else f"{cpu / (floor['user'] + floor['system']):5.2f} x bare"
        rate = f"{1e6 / cost['wall']:7,.0f}/s"
        print(
            f"  {variant:16} {cpu:6.1f} us CPU ({cost['user']:.1f} user, {cost['system']:.1f} system) {rate} {ratio}",
            flush=True,
        )


if __name__ == "__main__":
    main()
