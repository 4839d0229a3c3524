"""A run of many rows, stopped and resumed: time, CPU, memory, disk, and how soon each start sends its first request.

    python benchmarks/large.py --rows 10000000 --folder build/bench-large     # make bench-large
    python benchmarks/large.py --rows 20000                                   # in a temporary folder

Short rows (prompts of 0.2 KB) from JSONL to Parquet against `fixed_answer.py`. The run is stopped by
SIGTERM at 10, 50 and 99 % of its rows and started again; once it is complete it is started once more. Everything is
measured from outside, once a second.

The folder keeps the input, the run and what was measured. If the benchmark is killed, the same command continues it; a
start that was killed with it is not in the figures, but its rows are. The folder is deleted at the end, without --keep.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).parent

JOB = """
[endpoint]
url = "{url}"
name = "fixed"
api_key_env = "BENCH_KEY"

[request]
model = "vtrix-gpt-5.3-codex"
prompt = "Label this review: {{{{ text }}}}"
max_tokens = 64

[limits]
max_in_flight = {in_flight}

[output]
path = "{out}"
layout = "{layout}"
"""

STOPS = (0.1, 0.5, 0.99)
EVERY_S = 1.0

FLAT = 1.1
"""How much the peak memory of one stretch of the run may exceed that of the stretch before it, to be called flat."""


class Sample(msgspec.Struct, frozen=True):
    """A moment of a start. `peak_mb` is the highest resident set since the sample before, `anon_mb` what of the present
    one is not of files. `disk_mb` is the run's directory, files without a name included; `database_mb` of it is the
    checkpoint with its log.
    """

    at_s: float
    state: str
    rows: int
    peak_mb: float
    anon_mb: float
    disk_mb: float
    database_mb: float


class Start(msgspec.Struct, frozen=True):
    """One start of the run: from how many rows to how many; seconds to its first request, None if it sent none."""

    rows_before: int
    rows_after: int
    exit_code: int
    first_request_s: float | None
    wall_s: float
    sending_s: float
    cpu_s: float
    peak_mb: float
    samples: list[Sample]


class Progress(msgspec.Struct):
    """What is known so far; stored after each start."""

    rows: int
    layout: str
    starts: list[Start] = []
    again: Start | None = None


class Server:
    """The fixed-answer server, in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "fixed_answer.py")]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True)
        assert self._process.stdout is not None
        self.out = self._process.stdout
        self.url = self.out.readline().strip()

    def watch(self) -> None:
        """The next request's time will be printed."""
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)

    def first_request(self) -> float | None:
        """The time of the first request since `watch`; None if there was none."""
        return float(self.out.readline()) if select.select([self.out], [], [], 0)[0] else None

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def write_input(path: Path, rows: int) -> None:
    """JSON lines of some 0.2 KB, no two equal."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    text = "word " * 30
    with partial.open("w") as file:
        for first in range(0, rows, 10_000):
            some = range(first, min(first + 10_000, rows))
            lines = [f'{{"id": {row}, "text": "review {row} {text}"}}\n' for row in some]
            file.write("".join(lines))
    partial.rename(path)


def kilobytes(pid: int) -> dict[str, int]:
    """The memory of a process by the names of /proc/PID/status; its peak is counted afresh from now on."""
    status = Path(f"/proc/{pid}/status").read_text()
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}


def megabytes_on_disk(folder: Path, pattern: str = "**/*") -> float:
    """Blocks in use by files that have a name."""
    blocks = 0
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            blocks += path.stat().st_blocks
    return blocks * 512 / 1e6


def megabytes_without_name(pid: int) -> float:
    """Blocks in use by files that only the process has open."""
    blocks = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found = descriptor.stat()
            blocks += found.st_blocks if stat.S_ISREG(found.st_mode) and not found.st_nlink else 0
    return blocks * 512 / 1e6


def summary_of(out: Path) -> dict[str, Any]:
    """summary.json; empty before there is one."""
    try:
        return dict(json.loads((out / "summary.json").read_text()))
    except FileNotFoundError:
        return {}


def settled(summary: dict[str, Any]) -> int:
    return sum((summary.get("by_status") or {}).values())


def start(server: Server, job: Path, source: Path, out: Path, stop_at: int | None) -> Start:
    """Starts the run and watches it until it ends; at `stop_at` rows it gets a SIGTERM."""
    before = settled(summary_of(out))
    server.watch()
    started, began = time.time(), time.perf_counter()
    command = [str(Path(sys.executable).with_name("batchrun")), "run", str(job), "-i", str(source)]
    with (out.parent / "stderr.txt").open("a") as errors:
        process = subprocess.Popen(
            command, env={**os.environ, "BENCH_KEY": "bench-key-000000"}, stdout=subprocess.DEVNULL, stderr=errors
        )
    samples: list[Sample] = []
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(EVERY_S if samples else 0.2)
        with contextlib.suppress(OSError, KeyError):  # the process has ended
            memory, summary = kilobytes(process.pid), summary_of(out)
            samples.append(
                Sample(
                    at_s=time.perf_counter() - began,
                    state=str(summary.get("state")) if summary.get("pid") == process.pid else "starting",
                    rows=settled(summary),
                    peak_mb=memory["VmHWM"] / 1024,
                    anon_mb=memory["RssAnon"] / 1024,
                    disk_mb=megabytes_on_disk(out) + megabytes_without_name(process.pid),
                    database_mb=megabytes_on_disk(out, "checkpoint.db*"),
                )
            )
            if stop_at is not None and samples[-1].rows >= stop_at:
                process.terminate()
                stop_at = None
    _, status, used = os.wait4(process.pid, 0)
    wall_s, first = time.perf_counter() - began, server.first_request()
    sending = [sample.at_s for sample in samples if sample.state == "running"]
    return Start(
        rows_before=before,
        rows_after=settled(summary_of(out)),
        exit_code=os.waitstatus_to_exitcode(status),
        first_request_s=None if first is None else first - started,
        wall_s=wall_s,
        sending_s=max(sending) - (first - started) if sending and first is not None else 0.0,
        cpu_s=used.ru_utime + used.ru_stime,
        peak_mb=max(sample.peak_mb for sample in samples),
        samples=samples,
    )


def measure(folder: Path, rows: int, layout: str, in_flight: int, stops: tuple[float, ...]) -> Progress:
    """Runs to the end whatever is not done yet."""
    known, out, job = folder / "measured.json", folder / "run", folder / "job.toml"
    progress = Progress(rows, layout)
    if known.exists():
        progress = msgspec.json.decode(known.read_bytes(), type=Progress)
    if (progress.rows, progress.layout) != (rows, layout):
        raise SystemExit(f"{folder} holds a benchmark of {progress.rows:,} rows, layout {progress.layout}")
    source = folder / "input.jsonl"
    write_input(source, rows)
    with contextlib.closing(Server()) as server:
        job.write_text(JOB.format(url=server.url, out=out, layout=layout, in_flight=in_flight))
        while progress.again is None:
            done = settled(summary_of(out))
            complete = summary_of(out).get("complete")
            stop_at = next((int(rows * stop) for stop in stops if int(rows * stop) > done), None)
            ended = start(server, job, source, out, stop_at)
            if ended.exit_code not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
                raise SystemExit(f"the run ended with {ended.exit_code}: see {folder}/stderr.txt")
            if complete:
                progress.again = ended
            else:
                progress.starts.append(ended)
            known.write_bytes(msgspec.json.encode(progress))
            print(in_words(ended), file=sys.stderr, flush=True)
    return progress


def in_words(one: Start) -> str:
    first = "no request" if one.first_request_s is None else f"first request after {one.first_request_s:.2f} s"
    return (
        f"rows {one.rows_before:,} to {one.rows_after:,}: {first}, {one.wall_s:.1f} s, "
        f"{one.cpu_s:.1f} s of CPU, {one.peak_mb:.0f} MB, exit code {one.exit_code}"
    )


def table(progress: Progress, out: Path) -> Iterator[str]:
    """The figures as a table in Markdown."""
    starts, rows = progress.starts, progress.rows
    samples = [sample for one in starts for sample in one.samples]
    sent, sending_s = rows, sum(one.sending_s for one in starts)
    wall_s, cpu_s = sum(one.wall_s for one in starts), sum(one.cpu_s for one in starts)
    result = megabytes_on_disk(out, "completions*") + megabytes_on_disk(out, "completions/*.parquet")
    peak_disk = max(sample.disk_mb for sample in samples)
    yield f"| {rows:,} rows, layout {progress.layout} | |\n| --- | --- |"
    yield f"| wall, all starts | {wall_s:,.0f} s |"
    yield f"| rows/s while sending | {sent / sending_s if sending_s else 0:,.0f} |"
    yield f"| CPU a row, checks and result included | {cpu_s / rows * 1e6:,.0f} µs |"
    for one in starts:
        if one.first_request_s is not None:
            share = f"with {one.rows_before / rows:.0%} of the rows" if one.rows_before else "at the first start"
            yield f"| first request {share} | {one.first_request_s:.2f} s |"
    last = samples[-1].at_s - max((s.at_s for s in starts[-1].samples if s.state == "running"), default=0.0)
    yield f"| the result written, after the last row | {last:.1f} s |"
    if progress.again is not None:
        yield f"| a complete run started again | {progress.again.wall_s:.2f} s, {progress.again.peak_mb:.0f} MB |"
    for name, peak_mb in peaks(samples):
        yield f"| peak memory {name} | {peak_mb:.0f} MB |"
    yield f"| result | {result:,.0f} MB |"
    yield f"| peak disk of the run's directory | {peak_disk:,.0f} MB, {peak_disk / result:.2f} × the result |"
    yield f"| largest checkpoint.db with its log | {max(sample.database_mb for sample in samples):,.0f} MB |"


def peaks(samples: list[Sample]) -> Iterator[tuple[str, float]]:
    """The peak memory by what the run did; while it sent, by stretches of rows of about equal length."""
    for state, name in (("starting", "at a start"), ("checking", "while the input is checked")):
        if found := [sample.peak_mb for sample in samples if sample.state == state]:
            yield name, max(found)
    sending = [sample for sample in samples if sample.state == "running"]
    for first, end in itertools.pairwise((0, 20_000, 200_000, 1_000_000, 2_000_000, 5_000_000, 1 << 62)):
        if found := [sample.peak_mb for sample in sending if first <= sample.rows < end]:
            yield f"from {first:,} to {min(end, max(s.rows for s in sending)):,} rows", max(found)
    if found := [sample.peak_mb for sample in samples if sample.state == "writing"]:
        yield "while the result is written", max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--layout", default="file", choices=["file", "parts"])
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--straight", action="store_true", help="don't stop the run before its end")
    parser.add_argument("--folder", type=Path, help="kept while the benchmark is not done; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the folder at the end")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="batchrun-bench-", dir="."))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stops = () if arguments.straight else STOPS
    progress = measure(folder, arguments.rows, arguments.layout, arguments.in_flight, stops)
    print("\n".join(table(progress, folder / "run")))
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
