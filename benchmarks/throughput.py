"""Rows per second, CPU per row and memory of a whole run against a fixed-answer server on this machine.

    python benchmarks/throughput.py 20000 200000      # rows of each run; about a minute

Prints a line a run: rows/s and CPU from the first request to the last commit and over the whole process, and the peak
RSS. `bare` is the same client in a loop with nothing around it: what the machine can do at most.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
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
import asyncio, resource, sys, time, aiohttp, msgspec
url, rows, in_flight = sys.argv[1] + "/chat/completions", int(sys.argv[2]), int(sys.argv[3])
body = msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "word " * 30}]})
async def main():
    left = iter(range(rows))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async def work():
            for _ in left:
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    msgspec.json.decode(await response.read())
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(in_flight)))
        return time.perf_counter() - started
try:
    import uvloop
    seconds = asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
except ImportError:
    seconds = asyncio.run(main())
used = resource.getrusage(resource.RUSAGE_SELF)
print(rows / seconds, (used.ru_utime + used.ru_stime) / rows * 1e6, used.ru_maxrss / 1024)
"""


def write_input(path: Path, rows: int) -> None:
    with path.open("w") as file:
        for row in range(rows):
            file.write(
                json.dumps({"id": row, "text": f"review {row} " + "word " * (20 + row % 20), "stars": row % 5}) + "\n"
            )


def whole_run(url: str, rows: int, in_flight: int, folder: Path) -> str:
    source, job, out = folder / f"{rows}.jsonl", folder / "job.toml", folder / f"out-{rows}"
    write_input(source, rows)
    job.write_text(JOB.format(url=url, in_flight=in_flight, out=out))
    environ = {**os.environ, "BENCH_KEY": "bench-key-000000"}
    command = [sys.executable, "-c", "from batchrun.cli import main; main()", "run", str(job), "-i", str(source)]
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"the run ended with {os.waitstatus_to_exitcode(status)}")
    log = [json.loads(line) for line in (out / "run.log").read_text().splitlines()]
    asked = [time.mktime(time.strptime(re.sub(r"\..*", "", line["at"]), "%Y-%m-%dT%H:%M:%S")) for line in log]
    asking_s = max(asked[-1] - asked[0], 1.0)
    cpu_us = (used.ru_utime + used.ru_stime) / rows * 1e6
    return (
        f"{rows:>9,} rows  {rows / asking_s:>7,.0f} rows/s asking  {rows / seconds:>7,.0f} rows/s whole  "
        f"{cpu_us:>5.0f} us CPU/row  {used.ru_maxrss / 1024:>4.0f} MB peak RSS"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[20_000, 200_000])
    parser.add_argument("--in-flight", type=int, default=64)
    arguments = parser.parse_args()
    server = subprocess.Popen([sys.executable, str(HERE / "fixed_answer.py")], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().strip()
    try:
        bare = subprocess.run(
            [sys.executable, "-c", BARE, url, "30000", str(arguments.in_flight)],
            check=True,
            capture_output=True,
            text=True,
        )
        rate, cpu_us, rss = map(float, bare.stdout.split())
        print(f"     bare loop  {rate:>7,.0f} requests/s  {cpu_us:.0f} us CPU/request  {rss:.0f} MB", flush=True)
        for rows in arguments.rows:
            with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
                print(whole_run(url, rows, arguments.in_flight, Path(folder).resolve()), flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
