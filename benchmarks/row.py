"""What a durable, priced row costs, beside a bare `session.post` loop of the same minute.

    python benchmarks/row.py                     # three rounds of 10,000 and 40,000 rows; some three minutes
    python benchmarks/row.py --in-flight 256
    python benchmarks/row.py --instructions      # instructions instead of time, by valgrind
    python benchmarks/row.py --instructions --set telemetry.otel=true            # of a job with this setting, too
    python benchmarks/row.py --guard             # the same, against benchmarks/row_baseline.json: 1 beyond 15 %

A whole `batchrun run` from JSONL to Parquet against `fixed_answer.py`. The cost of a row is the slope between a short
run and a long one; what both have, imports and the connections, is counted apart as fixed. Medians of the rounds. The
instructions are those of user space, which other work on the machine does not change: they are what the guard counts.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from throughput import BARE, JOB, fixed_answer_server, write_input

HERE = Path(__file__).parent
BASELINE = HERE / "row_baseline.json"
MARGIN = 1.15
"""How much more than the baseline the guard lets pass: thread timing moves the count by a few per cent."""

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


def command(url: str, rows: int, in_flight: int, folder: Path) -> list[str]:
    """What comes after `python -c PROGRAM`."""
    source, job = folder / f"{rows}.jsonl", folder / f"{rows}.toml"
    write_input(source, rows)
    out = folder / f"out-{len(list(folder.iterdir()))}"
    job.write_text(JOB.format(url=url, in_flight=in_flight, out=out))
    return ["run", str(job), "-i", str(source)]


def environ() -> dict[str, str]:
    return {**os.environ, "BENCH_KEY": "bench-key-000000", "PYTHONHASHSEED": "0"}


def cpu_s(url: str, rows: int, in_flight: int) -> dict[str, float]:
    """Seconds of CPU of one run, by thread and by mode."""
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        arguments = command(url, rows, in_flight, Path(folder).resolve())
        ended = subprocess.run(
            [sys.executable, "-c", BY_THREAD, *arguments], check=True, capture_output=True, text=True, env=environ()
        )
    reported = json.loads(ended.stdout.splitlines()[-1])
    whole = reported["user"] + reported["system"]
    return {**reported["threads"], "all": whole, "of it in the kernel": reported["system"]}


def bare_us(url: str, in_flight: int) -> float:
    """Microseconds of CPU of one request in a bare loop."""
    ended = subprocess.run(
        [sys.executable, "-c", BARE, url, "20000", str(in_flight)], check=True, capture_output=True, text=True
    )
    return float(ended.stdout.split()[1])


def instructions(arguments: list[str]) -> int:
    """Those of one Python program, in user space."""
    valgrind = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    ended = subprocess.run(
        [*valgrind, sys.executable, *arguments], check=True, capture_output=True, text=True, env=environ()
    )
    found = re.search(r"I\s+refs:\s+([\d,]+)", ended.stderr)
    assert found is not None, ended.stderr
    return int(found[1].replace(",", ""))


def slope(few: float, many: float, rows: tuple[int, int]) -> tuple[float, float]:
    """(of one row, of none)."""
    each = (many - few) / (rows[1] - rows[0])
    return each, few - rows[0] * each


def counted(url: str, in_flight: int, settings: Sequence[str] = ()) -> tuple[float, float]:
    """Thousands of instructions of a row, and millions of a run without rows."""
    more = [word for setting in settings for word in ("--set", setting)]
    program = ["-c", "from batchrun.cli import main; main()"]
    with tempfile.TemporaryDirectory(prefix="batchrun-bench-", dir=".") as folder:
        made = Path(folder).resolve()
        few, many = (instructions([*program, *command(url, rows, in_flight, made), *more]) for rows in (FEW, MANY))
    each, none = slope(few, many, (FEW, MANY))
    return each / 1e3, none / 1e6


def bare_counted(url: str, in_flight: int) -> float:
    """Thousands of instructions of a request in a bare loop."""
    few, many = (instructions(["-c", BARE, url, str(count), str(in_flight)]) for count in (FEW, MANY))
    return slope(few, many, (FEW, MANY))[0] / 1e3


def guard(url: str) -> None:
    """Ends with 1 where a row takes more bare requests' worth of instructions than the baseline and the margin."""
    allowed = json.loads(BASELINE.read_text())["times_the_bare_loop"] * MARGIN
    bare = bare_counted(url, 64)
    for _ in range(2):  # the timing of threads moves the count: twice too many is no chance
        each = counted(url, 64)[0]
        print(f"{each:,.0f} thousand instructions a row, {each / bare:.2f} x the bare loop; {allowed:.2f} are allowed")
        if each / bare <= allowed:
            return
    raise SystemExit(f"a row costs more than it did: find out why, or change {BASELINE.name} and say why")


def measure(url: str, in_flight: int, rounds: int) -> None:
    bare = [bare_us(url, in_flight) for _ in range(rounds)]
    runs = [(cpu_s(url, SHORT, in_flight), cpu_s(url, LONG, in_flight)) for _ in range(rounds)]
    print("| | µs of CPU a row | × bare | fixed, s |\n| --- | --- | --- | --- |")
    unit = statistics.median(bare)
    print(f"| bare loop | {unit:.0f} | 1.00 | |")
    for name in runs[0][1]:
        slopes = [slope(short.get(name, 0.0), long.get(name, 0.0), (SHORT, LONG)) for short, long in runs]
        each, fixed = (statistics.median(values) for values in zip(*slopes, strict=True))
        print(f"| {name} | {each * 1e6:.0f} | {each * 1e6 / unit:.2f} | {fixed:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--instructions", action="store_true")
    parser.add_argument("--guard", action="store_true")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    with fixed_answer_server() as url:
        if arguments.guard:
            guard(url)
        elif arguments.instructions:
            bare = bare_counted(url, arguments.in_flight)
            each, none = counted(url, arguments.in_flight, arguments.settings)
            print(f"bare loop: {bare:,.0f} thousand instructions a request")
            print(f"batchrun: {each:,.0f} thousand a row ({each / bare:.2f} × bare), {none:,.0f} million without rows")
        else:
            measure(url, arguments.in_flight, arguments.rounds)


if __name__ == "__main__":
    main()
