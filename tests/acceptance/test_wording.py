"""Counts and times as people read them: one row is no "1 rows", and no time is "0.0 min"."""

import re
from pathlib import Path

import pytest

from batchrun.report.wording import are, plural
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.startup.estimate import duration
from tests.cli_process import batchrun, write_job, write_rows
from tests.simulator_process import running_simulator

ODD = re.compile(r"\b1 (?!in\b)[a-z ]*?(rows|requests|answers|records|attempts|files|connections)\b(?! a )|\b0\.0 min")


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 rows are"), (1, "1 row is"), (2, "2 rows are"), (1_000, "1,000 rows are")]
)
def test_a_count_agrees_with_its_noun_and_verb(count: int, words: str) -> None:
    assert f"{plural(count, 'row')} {are(count)}" == words


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0, "less than a second"),
        (0.01, "less than a second"),
        (0.04, "2 s"),
        (0.99, "59 s"),
        (1.5, "1.5 min"),
        (720, "12.0 h"),
    ],
)
def test_a_duration_uses_a_useful_unit(minutes: float, words: str) -> None:
    assert duration(minutes) == words


@pytest.mark.heavy
def test_a_single_row_is_never_plural(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 1), tmp_path / "out"
    config = SimulatorConfig(latency_s=0, faults=parse_faults("400=1"))
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_minute = 6000\n")
        reported = [batchrun(command, job) for command in ("check", "estimate")]
        reported += [batchrun("run", job, "-o", out, *more) for more in ((), (), ("--retry-failed",))]
        reported += [batchrun("estimate", job, "-o", out)]
        reported += [batchrun(command, out) for command in ("status", "verify")]
    for ended in reported:
        assert ended.exit_code in (0, 2, 3), ended
        assert not ODD.search(ended.stdout + ended.stderr), ended
    assert "1 row, more than output.max_failures = 0" in reported[2].stdout
