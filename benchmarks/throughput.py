"""Rows per second, CPU per row and memory of a whole run against a fixed-answer server on this machine.

    python benchmarks/throughput.py 20000 200000      # rows of each run; about a minute

Prints a line a run: rows/s and CPU from the first request to the last commit and over the whole process, and the peak
RSS. `bare` is the same client in a loop with nothing around it: what the machine can do at most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).parent

JOB = """
[endpoint]
url = "{url}"
api_key_env = "BENCH_KEY"

[request]
model = "vtrix-gpt-5.3-codex"
system = "You label product reviews."
prompt = "Label this review: {{{{ text }}}}"
max_tokens = 64

[limits]
max_in_flight = {in_flight}

[output]
path = "{out}"
"""

BARE = """
import asyncio, resource, ssl, sys, time, aiohttp, msgspec
url, rows, in_flight = sys.argv[1] + "/chat/completions", int(sys.argv[2]), int(sys.argv[3])
body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "word " * 30}]})
async def main():
    left = iter(range(rows))
    tls = ssl.create_default_context(cafile=sys.argv[4]) if url.startswith("https:") else True
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=tls)) as session:
        async def work():
            for _ in left:
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    msgspec.json.decode(await response.read())
        started, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return time.perf_counter() - started, time.process_time() - used
try:
    import uvloop
    seconds, cpu_s = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
except ImportError:
    seconds, cpu_s = asyncio.run(main())
print(rows / seconds, cpu_s / rows * 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def write_input(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for row in range(rows):
            file.write(
                json.dumps({"id": row, "text": f"review {row} " + "word " * (20 + row % 20), "stars": row % 5}) + "\n"
            )


@dataclass(frozen=True)
class Measured:
    """One whole run: seconds from the first request to the last commit, and the process's own account."""

    rows: int
    asking_s: float
    whole_s: float
    cpu_s: float
    peak_mb: float

    def __str__(self) -> str:
        return (
            f"{self.rows:>9,} rows  {self.rows / self.asking_s:>7,.0f} rows/s asking  "
            f"{self.rows / self.whole_s:>7,.0f} rows/s whole  {self.cpu_s / self.rows * 1e6:>5.0f} us CPU/row  "
            f"{self.peak_mb:>4.0f} MB peak RSS"
        )


def whole_run(url: str, rows: int, in_flight: int, folder: Path, prelude: str = "") -> Measured:
    """A run of the command line over an input made for it; `prelude` is Python that runs before it in its process."""
    source, job, out = folder / f"{rows}.jsonl", folder / "job.toml", folder / f"out-{rows}-{len(prelude)}"
    write_input(source, rows)
    job.write_text(JOB.format(url=url, in_flight=in_flight, out=out))
    environ = {**os.environ, "BENCH_KEY": "bench-key-000000"}
    program = f"{prelude}\nfrom batchrun.cli import main; main()"
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", str(job), "-i", str(source)],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    whole_s = time.perf_counter() - started
    if status:
        raise SystemExit(f"the run ended with {os.waitstatus_to_exitcode(status)}")
    log = [json.loads(line) for line in (out / "run.log").read_text().splitlines()]
    times = [datetime.fromisoformat(line["at"]).timestamp() for line in log]
    return Measured(rows, times[-1] - times[0], whole_s, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


@contextmanager
def fixed_answer_server(certificate: Path | None = None) -> Iterator[str]:
    """The base URL of a fixed-answer server, until the block ends; over TLS with certificate and key in one file."""
    command = [sys.executable, str(HERE / "fixed_answer.py"), *([str(certificate)] if certificate else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def bare_loop(url: str, in_flight: int) -> str:
    """The same client with nothing around it: what this machine can do at most."""
    command = [sys.executable, "-c", BARE, url, "30000", str(in_flight)]
    bare = subprocess.run(command, check=True, capture_output=True, text=True)
    rate, cpu_us, rss = map(float, bare.stdout.split())
    return f"     bare loop  {rate:>7,.0f} requests/s  {cpu_us:.0f} us CPU/request  {rss:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[20_000, 200_000])
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    with fixed_answer_server() as url:
        print(bare_loop(url, arguments.in_flight), flush=True)
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
                print(whole_run(url, rows, arguments.in_flight, Path(folder).resolve()), flush=True)


if __name__ == "__main__":
    main()
