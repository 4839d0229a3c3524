"""What a durable, priced row costs, beside a bare `session.post` loop of the same minute.

    python benchmarks/row.py                     # three rounds of 10,000 and 40,000 rows; some three minutes
    python benchmarks/row.py --in-flight 256
    python benchmarks/row.py --tls               # over TLS, beside a bare loop over TLS
    python benchmarks/row.py --lag               # how late the event loop is, in all and while parts are sealed
    python benchmarks/row.py --instructions      # instructions instead of time, by valgrind
    python benchmarks/row.py --instructions --set telemetry.otel=true            # of a job with this setting, too
    python benchmarks/row.py --guard             # the same, against benchmarks/row_baseline.json: 1 beyond 15 %

A whole `batchrun run` from JSONL to Parquet against `fixed_answer.py`. The cost of a row is the slope between a short
run and a long one; what both have, imports and the connections, is counted apart as fixed. Medians of the rounds. The
instructions are those of user space, which other work on the machine does not change: they are what the guard counts.
"""

import argparse
import compileall
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from throughput import BARE, JOB, fixed_answer_server, write_input
from wire import self_signed

HERE = Path(__file__).parent
BASELINE = HERE / "row_baseline.json"
MARGIN = 1.15
"""How much more than the baseline the guard lets pass: thread timing moves the count by a few per cent."""

WALL = "seconds on the wall"

SHORT, LONG = 10_000, 40_000
FEW, MANY = 500, 2_000
"""Rows under valgrind, which is fifty times slower."""

BY_THREAD = """
import atexit, collections, json, os, threading, time
spent, run = collections.Counter(), threading.Thread.run
def timed(self):
    started = time.thread_time()
    try:
        run(self)
    finally:
        spent["checkpoint" if self.name == "checkpoint" else "chunks opened and sealed"] += time.thread_time() - started
threading.Thread.run = timed
def tell():
    used = os.times()
    threads = {"event loop, check and result": time.thread_time(), **spent}
    print(json.dumps({"threads": threads, "user": used.user, "system": used.system}))
atexit.register(tell)
from batchrun.cli import main; main()
"""

FORKED = """
import importlib, json, os, sys
for name in ("batchrun.commands.run", "batchrun.dispatch.dispatch", "aiohttp", "uvloop"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
processes = {}
for name, (program, arguments) in json.loads(sys.argv[1]).items():
    if not (process := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv[1:] = arguments
        exec(program, {"__name__": "__main__"})
        sys.exit()
    if os.waitpid(process, 0)[1]:
        sys.exit(f"{name} failed: run it without valgrind")
    processes[name] = process
print(json.dumps(processes))
"""

LAG = """
import asyncio, contextlib, json, time
from batchrun.dispatch.heartbeat import Heartbeat
from batchrun.store.chunks import Chunks
EVERY_S = 0.002
late, seals, beat, seal = [], [], Heartbeat.beat, Chunks.seal
async def probe():
    while True:
        due = time.monotonic() + EVERY_S
        await asyncio.sleep(EVERY_S)
        late.append((due, time.monotonic() - due))
async def probed(self):
    task = asyncio.create_task(probe())
    try:
        await beat(self)
    finally:
        task.cancel()
def timed(self, chunk):
    started = time.monotonic()
    try:
        return seal(self, chunk)
    finally:
        seals.append((started, time.monotonic()))
Heartbeat.beat, Chunks.seal = probed, timed
with contextlib.suppress(SystemExit):
    from batchrun.cli import main; main()
during = [lag for due, lag in late if any(start <= due <= end for start, end in seals)]
print(json.dumps({"in all": [lag for _, lag in late], "while parts are sealed": during}))
"""


class Target(NamedTuple):
    """Where requests go, how many at once, and the job's other settings. `ca_file` is for the bare loop."""

    url: str
    in_flight: int
    settings: tuple[str, ...] = ()
    ca_file: str = ""


def command(to: Target, rows: int, folder: Path) -> list[str]:
    """What comes after `python -c PROGRAM`."""
    source, job = folder / f"{rows}.jsonl", folder / f"{rows}.toml"
    write_input(source, rows)
    out = folder / f"out-{len(list(folder.iterdir()))}"
    job.write_text(JOB.format(url=to.url, in_flight=to.in_flight, out=out))
    return ["run", str(job), "-i", str(source), *(word for setting in to.settings for word in ("--set", setting))]


def environ() -> dict[str, str]:
    return {**os.environ, "BENCH_KEY": "bench-key-000000", "PYTHONHASHSEED": "0"}


def reported_by(program: str, to: Target, rows: int) -> Any:
    """What a run within this program prints as its last line, in JSON."""
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        whole = [sys.executable, "-c", program, *command(to, rows, Path(folder).resolve())]
        ended = subprocess.run(whole, check=True, capture_output=True, text=True, env=environ())
    return json.loads(ended.stdout.splitlines()[-1])


def cpu_s(to: Target, rows: int) -> dict[str, float]:
    """Seconds of CPU of one run, by thread and by mode; and of the clock on the wall."""
    started = time.perf_counter()
    reported = reported_by(BY_THREAD, to, rows)
    whole = reported["user"] + reported["system"]
    kernel, wall = reported["system"], time.perf_counter() - started
    return {**reported["threads"], "all": whole, "of it in the kernel": kernel, WALL: wall}


def bare(to: Target) -> tuple[float, float]:
    """(microseconds of CPU of one request in a bare loop, its requests a second)."""
    ended = subprocess.run(
        [sys.executable, "-c", BARE, *bare_arguments(to, 20_000)], check=True, capture_output=True, text=True
    )
    rate, cpu_us, _ = map(float, ended.stdout.split())
    return cpu_us, rate


def bare_arguments(to: Target, requests: int) -> list[str]:
    return [to.url, str(requests), str(to.in_flight), to.ca_file]


def instructions(programs: Mapping[str, tuple[str, list[str]]]) -> dict[str, int]:
    """Those of each Python program with its arguments, in user space, by the programs' names.

    They are forks of one process that has imported what they need: under valgrind that takes longer than they do.
    """
    compileall.compile_dir(HERE.parent / "batchrun", quiet=1)  # or the first run compiles what the second only reads
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-") as folder:
        log = Path(folder) / "%p"
        valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
        whole = [*valgrind, f"--log-file={log}", sys.executable, "-c", FORKED, json.dumps(programs)]
        ended = subprocess.run(whole, check=True, stdout=subprocess.PIPE, text=True, env=environ())
        found = {}
        for name, process in json.loads(ended.stdout.splitlines()[-1]).items():
            counted = re.search(r"I\s+refs:\s+([\d,]+)", log.with_name(str(process)).read_text())
            assert counted is not None, name
            found[name] = int(counted[1].replace(",", ""))
    return found


def slope(few: float, many: float, rows: tuple[int, int]) -> tuple[float, float]:
    """(of one row, of none)."""
    each = (many - few) / (rows[1] - rows[0])
    return each, few - rows[0] * each


class Counted(NamedTuple):
    """Thousands of instructions of a request in a bare loop, and of a row; millions of a run without rows."""

    bare: float
    each: float
    none: float


def counted(to: Target) -> Counted:
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        made = Path(folder).resolve()
        programs = {f"bare {rows}": (BARE, bare_arguments(to, rows)) for rows in (FEW, MANY)}
        run = "from batchrun.cli import main; main()"
        found = instructions(programs | {f"run {rows}": (run, command(to, rows, made)) for rows in (FEW, MANY)})
    bare, _ = slope(found[f"bare {FEW}"], found[f"bare {MANY}"], (FEW, MANY))
    each, none = slope(found[f"run {FEW}"], found[f"run {MANY}"], (FEW, MANY))
    return Counted(bare / 1e3, each / 1e3, none / 1e6)


def guard(to: Target) -> None:
    """Ends with 1 where a row takes more bare requests' worth of instructions than the baseline and the margin."""
    allowed = json.loads(BASELINE.read_text())["times_the_bare_loop"] * MARGIN
    for _ in range(2):  # the timing of threads moves the count: twice too many is no chance
        bare, each, _ = counted(to)
        print(f"{each:,.0f} thousand instructions a row, {each / bare:.2f} x the bare loop; {allowed:.2f} are allowed")
        if each / bare <= allowed:
            return
    raise SystemExit(f"a row costs more than it did: find out why, or change {BASELINE.name} and say why")


def measure(to: Target, rounds: int) -> None:
    loops, runs = [], []
    for _ in range(rounds):  # they take turns, so that a slow minute of the machine meets both
        loops.append(bare(to))
        runs.append((cpu_s(to, SHORT), cpu_s(to, LONG)))
    print("| | µs of CPU a row | × bare | fixed, s |\n| --- | --- | --- | --- |")
    unit, bare_rate = (statistics.median(values) for values in zip(*loops, strict=True))
    print(f"| bare loop | {unit:.0f} | 1.00 | |")
    for name in runs[0][1]:
        slopes = [slope(short.get(name, 0.0), long.get(name, 0.0), (SHORT, LONG)) for short, long in runs]
        each, fixed = (statistics.median(values) for values in zip(*slopes, strict=True))
        if name == WALL:
            print(f"\n{1 / each:,.0f} rows/s of a bare loop's {bare_rate:,.0f}: {1 / each / bare_rate:.2f} x")
        else:
            print(f"| {name} | {each * 1e6:.0f} | {each * 1e6 / unit:.2f} | {fixed:.2f} |")


def lag(to: Target) -> None:
    """Prints how late a timer of 2 ms is, beside a whole run of LONG rows."""
    for when, lags in reported_by(LAG, to, LONG).items():
        found = [f"p{share} {statistics.quantiles(lags, n=1000)[share * 10 - 1] * 1e3:.1f} ms" for share in (50, 99)]
        print(f"{when}: {', '.join(found)}, the most {max(lags) * 1e3:.1f} ms, of {len(lags):,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--guard", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--lag", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-") as folder:
        certificate = self_signed(Path(folder)) if arguments.tls else None
        ca_file = f"{certificate}.crt" if certificate else ""
        with fixed_answer_server(certificate) as url:
            own = (f"endpoint.ca_file={ca_file}",) if ca_file else ()
            to = Target(url, arguments.in_flight, (*arguments.settings, *own), ca_file)
            if arguments.guard:
                guard(to)
            elif arguments.instructions:
                unit, each, none = counted(to)
                print(f"bare loop: {unit:,.0f} thousand instructions a request")
                print(f"batchrun: {each:,.0f} thousand a row ({each / unit:.2f} × bare), {none:,.0f} million without")
            elif arguments.lag:
                lag(to)
            else:
                measure(to, arguments.rounds)


if __name__ == "__main__":
    main()
