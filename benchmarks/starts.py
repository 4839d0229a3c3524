"""How long a start takes, to its first request, of a complete run, of `--help`; what a Runner's reader adds to a row.

    python benchmarks/starts.py            # some two minutes

Medians of five, wall time and CPU of the process, with the bytecode that pip writes for an installed package. On an
idle machine the two are about equal, because a start has one busy thread; on a busy one only CPU can be compared.
"""

import argparse
import compileall
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from large import Server, write_input
from throughput import JOB

import batchrun

ROUNDS = 5
SHORT, LONG = 10_000, 100_000
READ_ROWS = 20_000

BATCHRUN = [str(Path(sys.executable).with_name("batchrun"))]

READER = """
import asyncio, sys, batchrun
job, reads = sys.argv[1], sys.argv[2] == "reads"
async def main():
    async with batchrun.Runner(job) as runner:
        if reads:
            async for completion in runner:
                pass
        else:
            await runner.wait()
asyncio.run(main())
"""

Seconds = tuple[float, float]
"""(wall, CPU)."""


def environ() -> dict[str, str]:
    return {**os.environ, "BENCH_KEY": "bench-key-000000"}


def whole(command: list[str]) -> Seconds:
    """A process from its start to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - started, used.ru_utime + used.ru_stime


def to_first_request(server: Server, command: list[str]) -> Seconds:
    """A process from its start to its first request; it is killed then."""
    server.watch()
    started = time.time()
    process = subprocess.Popen(command, env=environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    select.select([server.out], [], [], 120)
    cpu_ns = sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"))
    first = server.first_request()
    process.kill()
    process.wait()
    assert first is not None, "no request came"
    return first - started, cpu_ns / 1e9


def median(measured: Callable[[], Seconds], rounds: int = ROUNDS) -> Seconds:
    return middle([measured() for _ in range(rounds)])


def middle(of: Sequence[Seconds]) -> Seconds:
    return statistics.median(wall for wall, _ in of), statistics.median(cpu for _, cpu in of)


def line(name: str, seconds: Seconds, target: str) -> None:
    print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} | {target} |", flush=True)


def job_of(folder: Path, url: str, rows: int, out: str) -> Path:
    source, job = folder / f"{rows}.jsonl", folder / f"{out}.toml"
    write_input(source, rows)
    job.write_text(JOB.format(url=url, in_flight=64, out=folder / out) + f'[input]\npath = "{source}"\n')
    return job


def measure(server: Server, folder: Path) -> None:
    print("| | wall, s | CPU, s | target |\n| --- | --- | --- | --- |")
    bare = median(lambda: whole([sys.executable, "-c", "import click"]))
    line("bare Python with click", bare, "")
    shown = median(lambda: whole([*BATCHRUN, "--help"]))
    line(f"`batchrun --help`, {shown[1] / bare[1]:.2f} × that", shown, "2.5 ×")
    made = iter(range(1_000_000))

    def first(rows: int) -> Seconds:
        job = job_of(folder, server.url, rows, f"first-{next(made)}")
        return to_first_request(server, [*BATCHRUN, "run", str(job)])

    short, long = median(lambda: first(SHORT)), median(lambda: first(LONG), 3)
    line(f"first request, {SHORT:,} rows", short, "0.6 s")
    each = (long[1] - short[1]) / (LONG - SHORT) * 1e6
    line(f"first request, {LONG:,} rows: {each:.1f} µs of CPU for each row more", long, "15 µs")
    job = job_of(folder, server.url, SHORT, "complete")
    whole([*BATCHRUN, "run", str(job)])
    line(
        f"a complete run of {SHORT:,} rows started again", median(lambda: whole([*BATCHRUN, "run", str(job)])), "0.5 s"
    )

    def through(how: str) -> Seconds:
        job = job_of(folder, server.url, READ_ROWS, f"{how}-{next(made)}")
        return whole([sys.executable, "-c", READER, str(job), how])

    pairs = [(through("waits"), through("reads")) for _ in range(ROUNDS)]  # in turns: the machine's speed changes
    line(f"a Runner without a reader, {READ_ROWS:,} rows", middle([waits for waits, _ in pairs]), "")
    more = statistics.median(reads[1] - waits[1] for waits, reads in pairs) / READ_ROWS * 1e6
    line(f"the same with a reader: {more:.0f} µs of CPU more a row", middle([reads for _, reads in pairs]), "30 µs")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compileall.compile_dir(Path(batchrun.__file__).parent, quiet=1)
    server = Server()
    try:
        with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
            measure(server, Path(folder).resolve())
    finally:
        server.close()


if __name__ == "__main__":
    main()
