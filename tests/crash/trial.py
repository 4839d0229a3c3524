"""One run, killed again and again, resumed until it is complete, and judged."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.simulator import Fault, SimulatorConfig, parse_faults
from batchrun.store import in_flight
from batchrun.store.in_flight import NamedRequest
from tests import cli_process, prefork
from tests.bills import bill_over
from tests.cli_process import KEY, KEY_ENV, Ended, read_summary, snapshot, write_job, write_rows
from tests.crash.launcher import Orders
from tests.crash.schedule import Kill, Plan
from tests.crash.verdict import Evidence, violations, wrong_order
from tests.simulator_process import RunningSimulator, running_simulator

ROWS = 300
CHUNK_ROWS = 15
MAX_IN_FLIGHT = 12
HUNG_S = 60.0

FAULTS = (
    Fault(kind="status", status=500, share=0.04, sticky=True, times=1, per_question=True),
    Fault(kind="cut", share=0.03, sticky=True, times=1, per_question=True),
    Fault(kind="reset", billed=True, share=0.03, sticky=True, times=1, per_question=True),
    Fault(
        kind="status",
        status=429,
        from_request=120,
        times=1,
        headers=(("retry-after-ms", "50"),),
        code="rate_limit_exceeded",
    ),
    *parse_faults("content_policy=0.06"),
)
"""All that recover do so at the second try of a question, so the statuses are those of an undisturbed run."""

MORE = f"""
[limits]
max_in_flight = {MAX_IN_FLIGHT}

[retry]
backoff_base_s = 0.02
max_maybe_billed = 3

[output]
chunk_rows = {CHUNK_ROWS}
layout = "{{layout}}"
max_failures = {ROWS}
"""

REFUSED = Fault(kind="status", status=400, share=0.2, sticky=True, times=1, per_question=True)
"""Rows that fail for good when they are first sent, and would succeed if they were sent again."""


@dataclass(frozen=True, slots=True)
class Death:
    """A death that came. `place` is the marked point, or the last one passed before a random kill."""

    marked: bool
    place: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run fared."""

    deaths: list[Death] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


def simulator_config(ledger: Path, *faults: Fault) -> SimulatorConfig:
    """Answers within hundredths of a second, a few stragglers within tenths, and the faults."""
    return SimulatorConfig(latency_s=0.025, latency_sigma=1.0, faults=(*FAULTS, *faults), ledger=str(ledger))


class Trial:
    """One run directory with its job, input, simulator and ledger."""

    def __init__(
        self,
        folder: Path,
        simulator: RunningSimulator,
        *,
        rows: int = ROWS,
        layout: str = "file",
        bug: str | None = None,
    ) -> None:
        folder.mkdir()
        self._rows = rows
        self.out = folder / "out"
        self.outcome = Outcome()
        self._where = folder / "where"
        self._trace = folder / "trace"
        self._simulator = simulator
        self._bug = bug
        self.flags: tuple[str, ...] = ()
        source = write_rows(folder / "in.jsonl", rows)
        self.job = write_job(folder / "job.toml", simulator.url, source, MORE.format(layout=layout))
        self._in_flight: list[list[NamedRequest]] = []

    def die(self, kill: Kill) -> bool:
        """The run is started and killed; False when it ended by itself, with luck or with an error on record."""
        process = self._start(kill)
        if kill.point is None:
            while not self._where.exists() and process.poll() is None:
                time.sleep(0.005)  # imports are a third of a short process's life: dying there shows nothing
            try:
                process.wait(kill.after_s)
            except subprocess.TimeoutExpired:
                process.kill()
        if not self._ended(process, -signal.SIGKILL, 0) or process.returncode == 0:
            return False
        last = self._where.read_bytes().rstrip(b"\0").decode() if self._where.exists() else ""
        self.outcome.deaths.append(Death(kill.point is not None, kill.point or last or "loading"))
        self._in_flight.append(in_flight.read(self.out / "inflight.bin"))
        return True

    def suffer(self, prefix: Sequence[str]) -> Ended:
        """The plain command line has run under `prefix`, a command that does it harm; how it ended is not judged."""
        program = [sys.executable, "-c", "from batchrun.cli import main; main()", "run", self.job, "-o", self.out]
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(
            [*prefix, *map(str, program)],
            env={**os.environ, KEY_ENV: KEY},
            text=True,
            start_new_session=True,
            **options,
        )
        try:
            ended = cli_process.finish(process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a killed strace lets go would run on
        self._in_flight.append(in_flight.read(self.out / "inflight.bin"))
        return ended

    def converge(self) -> bool:
        """The run is started and left alone; False, with an error on record, when it does not end well."""
        return self._ended(self._start(Kill()), 0)

    def start_again(self) -> None:
        """A finished run is a no-op: nothing sent, no file touched."""
        before, served = snapshot(self.out), len(self._simulator.ledger())
        ended = cli_process.batchrun("run", self.job, "-o", self.out)
        if ended.exit_code != 0:
            self.outcome.violations.append(f"a finished run again: exit code {ended.exit_code}: {ended.stderr.strip()}")
        if snapshot(self.out) != before:
            self.outcome.violations.append("a finished run again: files were touched")
        if len(self._simulator.ledger()) != served:
            self.outcome.violations.append("a finished run again: requests were sent")

    def judge(self, undisturbed: pa.Table) -> None:
        """Compares the finished run with the ledger and with an undisturbed run."""
        evidence = Evidence(
            rows=self._rows,
            max_in_flight=MAX_IN_FLIGHT,
            ledger=self._simulator.ledger(),
            summary=read_summary(self.out),
            output=self.completions(),
            usage=pq.read_table(self.out / "usage.parquet"),
            reported=bill_over([self.out], ("run",)),
            undisturbed=undisturbed,
            in_flight=self._in_flight,
            asked_again=sum(line.status == REFUSED.status for line in self._simulator.ledger()),
            files=frozenset(str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.is_file()),
        )
        self.outcome.violations.extend(violations(evidence))

    def judge_order(self) -> None:
        """The processes' own records of their calls are looked through; needs no end."""
        self.outcome.violations.extend(dict.fromkeys(wrong_order(self._trace.read_text().splitlines())))

    def completions(self) -> pa.Table:
        """The result, whatever its layout."""
        whole = self.out / "completions.parquet"
        return pq.read_table(whole if whole.exists() else self.out / "completions")

    def _start(self, kill: Kill) -> "subprocess.Popen[str]":
        self._where.unlink(missing_ok=True)
        orders = Orders(str(self._where), str(self._trace), kill.point, kill.passage, self._bug)
        arguments = [msgspec.json.encode(orders).decode(), "run", str(self.job), "-o", str(self.out), *self.flags]
        environ = {**os.environ, KEY_ENV: KEY}
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
        }
        return prefork.start("tests.crash.launcher", arguments, environ, **pipes)

    def _ended(self, process: "subprocess.Popen[str]", *allowed: int) -> bool:
        """The process has ended in one of the ways allowed; any other is a violation."""
        try:
            _, stderr = process.communicate(timeout=HUNG_S)
        except subprocess.TimeoutExpired:
            process.kill()
            _, stderr = process.communicate()
            self.outcome.violations.append(f"hung: {stderr.strip()}")
            return False
        if process.returncode not in allowed:
            self.outcome.violations.append(f"exit code {process.returncode}: {stderr.strip()}")
        return process.returncode in allowed


@dataclass(frozen=True, slots=True)
class Calm:
    """A run that was not killed: its result, and how long it took."""

    output: pa.Table
    took_s: float


def calm_run(folder: Path, rows: int = ROWS) -> Calm:
    """The measure of all others. It is judged itself."""
    with running_simulator(simulator_config(folder / "calm.ledger")) as simulator:
        trial = Trial(folder / "calm", simulator, rows=rows)
        started_s = time.monotonic()
        trial.converge()
        took_s = time.monotonic() - started_s
        output = trial.completions()
        trial.judge(output)
        assert not trial.outcome.violations, trial.outcome.violations
    return Calm(output, took_s)


def killed_run(folder: Path, plan: Plan, calm: Calm, *, bug: str | None = None) -> Outcome:
    """A run of its own in `folder`: it dies as planned as far as it can, converges, is started again, and judged."""
    folder.mkdir()
    with running_simulator(simulator_config(folder / "ledger")) as simulator:
        trial = Trial(folder / "run", simulator, rows=calm.output.num_rows, layout=plan.layout, bug=bug)
        for kill in plan.kills:
            if not trial.die(kill):
                break
        if not trial.outcome.violations and trial.converge():
            trial.start_again()
            trial.judge(calm.output)
        trial.judge_order()
    return trial.outcome


def killed_retry(folder: Path, kills: Sequence[Kill], calm: Calm) -> Outcome:
    """A finished run with failed rows, in `folder`, whose `--retry-failed` dies as planned; then as `killed_run`."""
    folder.mkdir()
    with running_simulator(simulator_config(folder / "ledger", REFUSED)) as simulator:
        trial = Trial(folder / "run", simulator)
        trial.converge()
        trial.flags = ("--retry-failed",)
        if all(trial.die(kill) for kill in kills) and trial.converge():
            trial.start_again()
            trial.judge(calm.output)
        trial.judge_order()
    return trial.outcome


def killed_shards(folder: Path, deaths: Sequence[Sequence[Kill]], calm: Calm) -> Outcome:
    """As many shards of one run in `folder`, each of which dies as planned and converges. They are merged, and the
    merged run is judged like one run by the ledger of them all.
    """
    folder.mkdir()
    count = len(deaths)
    with running_simulator(simulator_config(folder / "ledger")) as simulator:
        whole = Trial(folder / "whole", simulator)
        whole.out = folder / "night"
        shards: list[Path] = []
        for number, kills in enumerate(deaths):
            trial = Trial(folder / str(number), simulator)
            trial.out = folder / f"night.shard-{number}-of-{count}"
            trial.flags = ("--shard", f"{number}/{count}")
            for kill in kills:
                if not trial.die(kill):
                    break
            if not trial.outcome.violations:
                trial.converge()
            trial.judge_order()
            whole.outcome.deaths.extend(trial.outcome.deaths)
            whole.outcome.violations.extend(f"shard {number}: {each}" for each in trial.outcome.violations)
            whole._in_flight += trial._in_flight
            shards.append(trial.out)
        ended = cli_process.batchrun("merge", *shards)
        if ended.exit_code != 0:
            whole.outcome.violations.append(f"merge: exit code {ended.exit_code}: {ended.stderr.strip()}")
        else:
            whole.start_again()
            whole.judge(calm.output)
    return whole.outcome
