"""The command of `on_end` hears of every end of a start, and changes none of them."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from batchrun.simulator import SimulatorConfig, parse_faults
from tests.cli_process import KEY, KEY_ENV, Ended, batchrun, kill_when, start, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

RECORD = """
import json, os, sys
end = json.load(sys.stdin)
names = ("BATCHRUN_EXIT_CODE", "BATCHRUN_REASON", "BATCHRUN_OUT", "BATCHRUN_JOB")
end["environment"] = {name: os.environ.get(name) for name in names}
end["keys"] = [name for name, value in os.environ.items() if value == sys.argv[2]]
print("the command speaks")
with open(sys.argv[1], "a") as file:
    file.write(json.dumps(end) + "\\n")
"""


class Job(NamedTuple):
    """A job whose `on_end` writes what it gets into `ends`."""

    folder: Path
    file: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def run(self, *arguments: str, key: str = KEY) -> Ended:
        return batchrun("run", self.file, "-o", self.out, *arguments, key=key)

    def ends(self) -> list[dict[str, Any]]:
        ends = self.folder / "ends"
        return [json.loads(line) for line in ends.read_text().splitlines()] if ends.exists() else []


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02)) as running:
        yield running


def job(folder: Path, url: str, more: str = "", command: list[str] | None = None, rows: int = 4) -> Job:
    (folder / "record.py").write_text(RECORD)
    source = write_rows(folder / "in.jsonl", rows)
    file = write_job(folder / "night.toml", url, source, more)
    command = command or [sys.executable, str(folder / "record.py"), str(folder / "ends"), KEY]
    file.write_text(f"on_end = {json.dumps(command)}\n{file.read_text()}")
    return Job(folder, file)


def test_on_end_gets_the_summary(simulator: RunningSimulator, tmp_path: Path) -> None:
    night = job(tmp_path, simulator.url)
    for number in (1, 2):
        ended = night.run()
        assert ended.exit_code == 0
        assert "the command speaks" in ended.stderr
        assert "the command speaks" not in ended.stdout
        end = night.ends()[-1]
        assert len(night.ends()) == number
        assert (end["complete"], end["state"], end["rows"], end["exit_code"]) == (
            True,
            "complete",
            4,
            0,
        )
        environment = {"EXIT_CODE": "0", "REASON": "", "OUT": str(night.out), "JOB": "night"}
        assert end["environment"] == {f"BATCHRUN_{name}": value for name, value in environment.items()}
        assert end["keys"] == [KEY_ENV]  # it was in the environment before
    assert '"event":"on_end"' in (night.out / "run.log").read_text()


def test_on_end_gets_no_key_from_a_file(simulator: RunningSimulator, tmp_path: Path) -> None:
    night = job(tmp_path, simulator.url)
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    arguments = ("--set", "endpoint.api_key_env=", "--set", f'endpoint.api_key_file="{tmp_path / "key"}"')
    assert night.run(*arguments, key="another").exit_code == 0
    assert night.ends()[-1]["keys"] == []


@pytest.mark.heavy
def test_on_end_gets_every_exit_code(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.02, faults=parse_faults("400=0.5"), seed=3)) as failing:
        night = job(tmp_path, failing.url, rows=12)
        arguments: dict[int, tuple[str, ...]] = {
            4: ("--set", "budget.max_requests=2"),
            3: ("--accept-changes",),
            2: ("--set", "request.temperature=1"),
        }
        for code, options in arguments.items():
            assert night.run(*options).exit_code == code
            end = night.ends()[-1]
            assert (end["exit_code"], end["environment"]["BATCHRUN_EXIT_CODE"]) == (code, str(code))
            assert end["reason"] == (end["environment"]["BATCHRUN_REASON"] or None)
        assert night.run(key="").exit_code == 2  # before a summary is written
        end = night.ends()[-1]
        assert sorted(end) == sorted(["job", "state", "exit_code", "reason", "complete", "environment", "keys"])
        assert (end["complete"], end["exit_code"], end["state"]) == (False, 2, "failed")
        assert KEY_ENV in end["reason"]


@pytest.mark.heavy
def test_on_end_after_a_signal_and_a_lock(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.5)) as slow:
        night = job(tmp_path, slow.url, "[limits]\nmax_in_flight = 1", rows=50)
        process = start("run", night.file, "-o", night.out)
        kill_when(process, lambda: len(slow.ledger()) >= 2, number=0)
        assert night.run().exit_code == 6
        assert sorted(night.ends()[-1])[:4] == ["complete", "environment", "exit_code", "job"]
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == 143
        end = night.ends()[-1]
        assert (end["exit_code"], end["environment"]["BATCHRUN_EXIT_CODE"]) == (143, "143")
        assert end["pending"] > 0


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "exit 7"], "ended with exit code 7"),
        (["no-such-program"], "can't be started: No such file or directory"),
        (["sh", "-c", "sleep 50 & echo $! > {folder}/child; wait"], "took longer than 0.5 s"),
        (["true"], None),  # which reads nothing
    ],
)
def test_a_failing_on_end_is_a_warning(
    simulator: RunningSimulator, tmp_path: Path, command: list[str], said: str | None
) -> None:
    words = [word.replace("{folder}", shlex.quote(str(tmp_path))) for word in command]
    night = job(tmp_path, simulator.url, command=words)
    ended = night.run("--set", "on_end_timeout_s=0.5")
    assert ended.exit_code == 0
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: on_end")]
    assert [said in line for line in warnings] == ([] if said is None else [True])  # type: ignore[operator]
    if (child := tmp_path / "child").exists():
        assert not alive(int(child.read_text()))


def alive(pid: int) -> bool:
    for _ in range(100):  # until whoever inherited it has waited for it
        try:
            os.kill(pid, 0)
            if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.02)
    return True
