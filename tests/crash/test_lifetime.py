"""A run's whole life: started, failed, killed, stopped, changed, retried in any order, and compared with a plain model.

Two lives in the sample, ten at the full level; as many as the environment variable BATCHRUN_LIVES says
(docs/crash.md).
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from batchrun import credentials, engine
from batchrun.errors import CheckpointError, JobError
from batchrun.job.load import load
from batchrun.records import FAILURES
from batchrun.simulator import Fault, SimulatorConfig, read_ledger
from batchrun.startup.run_options import RunOptions
from batchrun.store.rundir import RunDirectory
from tests import level
from tests.cli_process import KEY, KEY_ENV, finish, read_summary, start, wait_until, write_job
from tests.simulator_process import running_simulator

LIVES = os.environ.get("BATCHRUN_LIVES")
STEPS = 12

ODD = "odd"
"""The sick endpoint answers questions that hold it with 400."""

MORE = """
[limits]
max_in_flight = 4

[output]
chunk_rows = 7
max_failures = 1000
"""

Settings = tuple[str, int]
"""The word that the prompt begins with, and max_tokens."""

CHANCES = st.integers(0, 2**64 - 1).map(random.Random)
"""Hypothesis likes to repeat itself; starts take too long for that."""

PENDING, FAILED, ANSWERED = "pending", "failed", "answered"


class Row(NamedTuple):
    """One line of the input; no question holds the note."""

    text: str
    note: int


class Question(NamedTuple):
    """All that decides an answer."""

    text: str
    settings: Settings


class Endpoints(NamedTuple):
    """Two endpoints that share a ledger, one of them sick; and one without, that the model itself asks."""

    well: str
    sick: str
    model: str
    ledger: Path


@contextmanager
def endpoints(folder: Path) -> Iterator[Endpoints]:
    ledger = folder / "ledger"
    slow = SimulatorConfig(latency_s=0.02, ledger=str(ledger))
    sick = SimulatorConfig(
        latency_s=0.02, ledger=str(ledger), faults=(Fault(kind="status", status=400, match=ODD, message="odd"),)
    )
    with running_simulator(slow) as well, running_simulator(sick) as ill, running_simulator() as own:
        yield Endpoints(well.url, ill.url, own.url, ledger)


@cache
def answer(url: str, question: Question) -> tuple[str, str]:
    """Status and content, as the endpoint itself answers the question."""
    word, max_tokens = question.settings
    body = {
        "model": "vtrix-gpt-5.3-codex",
        "messages": [{"role": "user", "content": f"{word}: {question.text}"}],
        "max_tokens": max_tokens,
    }
    headers = {"Authorization": "Bearer model", "Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    ) as response:
        choice = json.loads(response.read())["choices"][0]
    return "truncated" if choice["finish_reason"] == "length" else "ok", choice["message"]["content"]


class Lifetime(RuleBasedStateMachine):
    """The model: `rows` and `settings` are what the user has written; `laid` and `adopted` what the run goes by.

    `fate` is what can have become of each odd question; `held` bounds how many answers there are to each question,
    `due` how often it may have been requested, but for requests that were lost.
    """

    at: Endpoints
    lives: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = self.lives / str(len(list(self.lives.iterdir())))
        self.folder.mkdir()
        self.out = self.folder / "out"
        self.url = self.at.well
        self.settings: Settings = ("Say", 40)
        self.rows: list[Row] = []
        self.made = 0
        self.laid: list[Row] | None = None
        self.adopted = self.settings
        self.settled: int | None = None
        self.fate: dict[Question, set[str]] = {}
        self.held: Counter[Question] = Counter()
        self.due: Counter[Question] = Counter()

    # ── what the user does ────────────────────────────────────────────────────────────────────────────────────────────

    @initialize(chance=CHANCES)
    def begin(self, chance: random.Random) -> None:
        self.rows = self.new_rows(chance.randint(10, 30))

    @rule(chance=CHANCES)
    def complete(self, chance: random.Random) -> None:
        self.change(chance)
        limit = chance.choice([None, chance.randint(1, 30)])
        accept = chance.random() < 0.7
        with self.started(accept, limit) as ended:
            ended(self.run(RunOptions(accept_changes=accept, limit=limit)))

    @precondition(lambda self: self.laid == self.rows and self.adopted == self.settings)
    @rule(chance=CHANCES)
    def retry_failed(self, chance: random.Random) -> None:
        self.url = chance.choice([self.at.sick, self.at.well])
        with self.started(accept=False, limit=None) as ended:
            for question, fates in self.fate.items():
                if FAILED in fates:
                    self.due[question] += 1
                    fates.add(PENDING)
            if self.settled == len(self.rows):
                self.fate = {question: fates - {FAILED} for question, fates in self.fate.items()}
            ended(self.run(RunOptions(retry=frozenset(map(str, FAILURES)))))

    @rule(chance=CHANCES)
    def interrupt(self, chance: random.Random) -> None:
        self.change(chance)
        accept = chance.random() < 0.7
        with self.started(accept, None) as ended:
            enough = len(read_ledger(self.at.ledger)) + chance.randint(1, 20)
            process = self.start(accept)
            wait_until(lambda: process.poll() is not None or len(read_ledger(self.at.ledger)) >= enough)
            process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
            ended(finish(process).exit_code)

    @rule(chance=CHANCES)
    def start_twice_at_once(self, chance: random.Random) -> None:
        self.change(chance)
        with self.started(accept=True, limit=None) as ended:
            file = self.write()  # once: neither may see its input change
            both = [self.launch(file, accept=True) for _ in range(2)]
            codes = sorted(finish(process).exit_code for process in both)
            assert codes[1] in (codes[0], 6)
            ended(codes[0])

    @precondition(lambda self: self.settled == len(self.rows) and self.laid == self.rows)
    @precondition(lambda self: self.adopted == self.settings)
    @rule(chance=CHANCES)
    def flip_a_bit(self, chance: random.Random) -> None:
        """A start over other notes, which reads all that the run has, says that it is damaged, or resumes as if nothing
        had changed; then the directory and the notes are what they were before.
        """
        served, rows, fate = len(read_ledger(self.at.ledger)), self.rows, self.fate
        aside = shutil.copytree(self.out, self.folder / "aside")
        files = sorted(path for path in self.out.rglob("*") if path.suffix in (".db", ".parquet"))
        self.flip(chance.choice(files), chance)
        self.rows = self.laid = [row._replace(note=row.note + 1) for row in rows]
        exit_code = self.run(RunOptions(accept_changes=True))
        assert exit_code in (0, 7)
        if exit_code == 0:
            self.done(None)
        assert len(read_ledger(self.at.ledger)) == served, "an answer that was there was requested again"
        self.rows, self.laid = rows, list(rows)  # the user may change the one, which the run does not have yet
        self.fate, self.settled = fate, len(rows)
        shutil.rmtree(self.out)
        aside.rename(self.out)

    def flip(self, path: Path, chance: random.Random) -> None:
        """One bit of the file is another."""
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

    def change(self, chance: random.Random) -> None:
        """Before half of the starts, something is another."""
        copied = chance.choice([row for row in self.rows if ODD not in row.text])
        place, (new,) = chance.randrange(len(self.rows)), self.new_rows(1)
        match chance.randrange(16):
            case 0:
                self.rows += self.new_rows(chance.randrange(9))
            case 1:
                self.rows[place:place] = [new, copied]
            case 2:
                self.rows[place] = new
            case 3 if len(self.rows) > 8:
                del self.rows[place]
            case 4:
                chance.shuffle(self.rows)
            case 5:
                self.rows = [row._replace(note=row.note + 1) for row in self.rows]
            case 6:
                self.settings = chance.choice([("Say", 40), ("Say", 12), ("Tell", 40)])
            case 7 | 8:
                self.url = self.at.sick if self.url == self.at.well else self.at.well

    def teardown(self) -> None:
        if self.rows:
            with self.started(accept=True, limit=None) as ended:
                ended(self.run(RunOptions(accept_changes=True)))
            assert self.settled == len(self.rows)

    # ── what must come of it ──────────────────────────────────────────────────────────────────────────────────────────

    @contextmanager
    def started(self, accept: bool, limit: int | None) -> Iterator[Callable[[int], None]]:
        """The model has followed a start; the block gives the exit code, or none."""
        harm = None if accept else self.harm()
        served, result = len(self.ledger()), self.result()
        known = (self.laid, self.adopted, self.settled, self.fate, self.held, self.due)
        self.fate = {question: set(fates) for question, fates in self.fate.items()}
        self.held, self.due = self.held.copy(), self.due.copy()
        self.lay_out()
        target = Counter(self.questions()[: limit and max(limit, self.reached())])
        self.due += target - self.held
        self.held |= target

        def ended(exit_code: int) -> None:
            if exit_code == 2:
                too_late = limit is not None and known[2] is None
                assert too_late or (harm is not False and not accept), "a change that harms nothing was refused"
                self.laid, self.adopted, self.settled, self.fate, self.held, self.due = known
                assert len(self.ledger()) == served or self.settled is None
                assert self.result() == result
                return
            assert harm is not True, "answers were given up without consent"
            if exit_code == 0:
                self.done(limit)
            else:
                assert exit_code in (143, -signal.SIGTERM, -signal.SIGKILL)  # the second: it had all but ended
                self.settled = None
                self.meet({PENDING, self.outcome()})
                assert self.result() == result or read_summary(self.out)["state"] != "running"
            self.judge_ledger()

        yield ended

    def harm(self) -> bool | None:
        """True where the change gives up answers or moves them, None where that depends on how far the run came."""
        if self.laid is None:
            return False
        old, new = [Question(row.text, self.adopted) for row in self.laid], self.questions()
        if old == new[: len(old)]:
            return False
        if self.settled is None:
            return None
        answered = [place for place in range(self.settled) if self.fate.get(old[place], {ANSWERED}) != {FAILED}]
        return any(place >= len(new) or old[place] != new[place] for place in answered)

    def lay_out(self) -> None:
        """The run goes by what the user has written."""
        if (self.laid, self.adopted) != (self.rows, self.settings):
            self.settled = None
        self.laid, self.adopted = list(self.rows), self.settings
        questions = self.questions()
        self.held &= Counter(questions)
        self.fate = {question: self.fate.get(question, {PENDING}) for question in questions if ODD in question.text}

    def reached(self) -> int:
        """The rows up to the last that may have its answer: all rows before it are sent, whatever the limit."""
        return max((row + 1 for row, question in enumerate(self.questions()) if self.held[question]), default=0)

    def outcome(self) -> str:
        return FAILED if self.url == self.at.sick else ANSWERED

    def meet(self, outcomes: set[str], upto: int | None = None) -> None:
        """Odd questions that may have been pending have met the endpoint."""
        for question in self.questions()[:upto]:
            if PENDING in self.fate.get(question, ()):
                self.fate[question] = self.fate[question] - {PENDING} | outcomes

    def done(self, limit: int | None) -> None:
        """The result has the rows that were wanted, each with its question's answer, or failed where it may have."""
        result = pq.read_table(self.out / "completions.parquet", page_checksum_verification=True).to_pylist()
        assert len(result) >= min(limit or len(self.rows), len(self.rows))
        self.meet({self.outcome()}, len(result))
        served = {line.request_id for line in self.ledger()}
        for row, (place, question) in zip(result, enumerate(self.questions()), strict=False):
            assert (row["row"], row["text"], row["note"]) == (place, question.text, self.rows[place].note)
            assert row["request_id"] in served
            fates = self.fate.setdefault(question, {ANSWERED})
            if row["status"] == "error":
                assert FAILED in fates
                self.fate[question] = {FAILED}
            else:
                assert ANSWERED in fates
                assert (row["status"], row["content"]) == answer(self.at.model, question)
                self.fate[question] = {ANSWERED}
        self.fate = {question: fates for question, fates in self.fate.items() if ODD in question.text}
        summary = read_summary(self.out)
        assert (summary["complete"], summary["pending"]) == (True, 0)
        assert summary["by_status"] == dict(Counter(row["status"] for row in result))
        self.settled = len(result)

    def judge_ledger(self) -> None:
        """No request was sent more often than due, except requests that are named as lost, and retries."""
        summary = read_summary(self.out)
        retries = sum(line["attempts"] for line in summary["totals"] if line["status"] == "discarded")
        flying = 4 if self.settled is None else 0  # who was in flight at a kill is named by the next start
        assert len(self.ledger()) <= self.due.total() + summary["possibly_billed_count"] + retries + flying

    # ── the run itself ────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, options: RunOptions) -> int:
        """A start in this process; its exit code."""
        loaded = load(self.write(), self.overrides())
        try:
            summary = engine.run(
                loaded, RunDirectory(self.out), credentials.read(loaded.endpoint, {KEY_ENV: KEY}), options
            )
        except CheckpointError as error:
            return error.exit_code
        except JobError as error:
            if not re.search("--accept-changes|at least --limit", str(error)):
                raise
            return error.exit_code
        assert summary.exit_code is not None
        return summary.exit_code

    def start(self, accept: bool) -> "subprocess.Popen[str]":
        """A start in a process of its own."""
        return self.launch(self.write(), accept)

    def launch(self, file: Path, accept: bool) -> "subprocess.Popen[str]":
        """The same for a job and an input that are on disk."""
        sets = [word for override in self.overrides() for word in ("--set", override)]
        return start("run", file, "-o", self.out, *sets, *(["--accept-changes"] if accept else []))

    def write(self) -> Path:
        """The job and the input are on disk as the user has them now; the job."""
        source = self.folder / "in.jsonl"
        source.write_text("".join(json.dumps(row._asdict()) + "\n" for row in self.rows), "utf-8")
        return write_job(self.folder / "job.toml", self.url, source, MORE)

    def overrides(self) -> list[str]:
        word, max_tokens = self.settings
        # the model counts every row as a request of its own, also where two have the same text
        own = "input.dedupe=false"
        return [f"request.prompt={word}: {{{{ text }}}}", f"request.max_tokens={max_tokens}", own]

    def new_rows(self, count: int) -> list[Row]:
        """Rows that were never there; every sixth is odd."""
        first, self.made = self.made, self.made + count
        return [Row(f"item {n} {ODD if n % 6 == 5 else 'word'}", 0) for n in range(first, self.made)]

    def questions(self) -> list[Question]:
        return [Question(row.text, self.settings) for row in self.rows]

    def ledger(self) -> list[Any]:
        """What was served to this run."""
        run_id = (RunDirectory(self.out).read_summary() or {}).get("run_id")
        lines = read_ledger(self.at.ledger) if run_id else []
        return [line for line in lines if str(line.client_request_id).startswith(str(run_id))]

    def result(self) -> bytes | None:
        path = self.out / "completions.parquet"
        return path.read_bytes() if path.exists() else None


@pytest.mark.heavy
@pytest.mark.campaign
def test_a_run_survives_any_life_correctly(tmp_path: Path) -> None:
    """Whatever happens to it, its result is right and nothing is sent without need."""
    (tmp_path / "lives").mkdir()
    profile = settings(
        max_examples=int(LIVES or level.amount(2, 10)),
        stateful_step_count=STEPS,
        phases=[Phase.generate],  # a life takes seconds: none is lived again to be shorter
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    with endpoints(tmp_path) as at:

        class Life(Lifetime):
            pass

        Life.at, Life.lives = at, tmp_path / "lives"
        run_state_machine_as_test(Life, settings=profile)
