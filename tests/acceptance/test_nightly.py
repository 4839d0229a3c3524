"""Every snippet of docs/nightly.md works: run by a shell, or read by the program that it is for, or by its parser."""

import ast
import configparser
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest
import yaml

from batchrun.errors import ExitCode
from batchrun.simulator import SimulatorConfig
from batchrun.telemetry.metrics import METRICS
from tests.acceptance.test_docs import rows
from tests.cli_process import write_rows
from tests.simulator_process import running_simulator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/nightly.md").read_text("utf-8")
AIRFLOW = ROOT / ".venv/airflow/bin/python"
"""Made by `make airflow`."""

DETERMINATE = {1, 2, 3, 4, 7}
"""Codes that a retry would only repeat."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n([\s\S]*?)^```", PAGE, re.MULTILINE)


def block(language: str, holds: str) -> str:
    (found,) = [each for each in blocks(language) if holds in each]
    return found


class Place(NamedTuple):
    """What /srv/batch is in the page: a folder with the job, its input, and `.venv/bin/batchrun`."""

    folder: Path

    def sh(self, command: str, *, shell: str = "sh", **environ: str) -> int:
        """The exit code of a command with as little around it as cron gives."""
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(self.folder), "NIGHT_WAIT_S": "0.1", **environ}
        return subprocess.run([shell, "-c", self.here(command)], env=environ, cwd="/", timeout=120).returncode

    def here(self, text: str) -> str:
        return text.replace("/srv/batch", str(self.folder))

    @property
    def alerts(self) -> list[str]:
        """What `alert` was called with."""
        file = self.folder / "alerts"
        return file.read_text().splitlines() if file.exists() else []

    def runs(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "runs").glob("*/*") if (path / "summary.json").exists())

    def let_fail(self, code: int, times: int = 99) -> None:
        """`batchrun` ends with this code so many times, as some runs do; then it is itself again."""
        (self.folder / "failing").write_text("x\n" * times)
        (self.folder / "code").write_text(str(code))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_simulator(SimulatorConfig(latency_s=0.01)) as simulator:
        yield simulator.url


@pytest.fixture
def place(tmp_path: Path, url: str) -> Place:
    folder = tmp_path / "batch"
    (folder / ".venv/bin").mkdir(parents=True)
    write_rows(folder / "in.jsonl", 5)
    (folder / "tickets.toml").write_text(
        f'endpoint.url = "{url}"\nendpoint.api_key_env = "VTRIX_API_KEY"\ninput.path = "in.jsonl"\n'
        'request.model = "vtrix-gpt-5.3-codex"\nrequest.prompt = "Say: {{ text }}"\n'
    )
    (folder / "key.env").write_text("export VTRIX_API_KEY=secret\n")
    program(
        folder / ".venv/bin/batchrun",
        f'if [ -s "{folder}/failing" ]; then sed -i 1d "{folder}/failing"; exit $(cat "{folder}/code"); fi\n'
        f'export VTRIX_API_KEY=secret\nexec "{sys.executable}" -c "from batchrun.cli import main; main()" "$@"\n',
    )
    program(folder / "alert", f'echo "$1" >> "{folder}/alerts"\ncat > /dev/null\n')
    return Place(folder)


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_every_exit_code_has_its_line() -> None:
    listed = [int(code) for codes, *_ in rows("docs/nightly.md", "code", "what it means") for code in codes.split(",")]
    elsewhere = {ExitCode.SIGPIPE, ExitCode.DRIFT}  # of a reader of stdout, and of `report`
    assert sorted(listed) == sorted(set(ExitCode) - elsewhere)
    never = {
        int(code)
        for codes, _, retry, *_ in rows("docs/nightly.md", "code", "what it means")
        for code in codes.split(",")
        if retry.startswith(("no", "not"))
    }
    assert never == {*DETERMINATE, 0, 6}


# ── cron ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def night(place: Place) -> str:
    """The crontab's command, as cron takes it out of the line; the script is in its place."""
    script = place.folder / "night"
    script.write_text(place.here(block("sh", "#!/bin/sh")))
    script.chmod(0o700)
    (line,) = [line for line in block("cron", "command").splitlines() if not line.startswith("#")]
    minute, hour, *_, command = line.split(maxsplit=5)
    assert (minute, hour) == ("15", "2")
    assert "%" not in command
    return command


def test_the_cron_line_runs_the_job(place: Place) -> None:
    command = night(place)
    assert place.sh(command) == 0
    assert len(place.runs()) == 1
    assert place.sh(command) == 0
    assert place.alerts == []


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("code", "times", "ends", "alerted"),
    [(5, 2, 0, False), (5, 99, 5, True), (129, 1, 0, False), (6, 1, 6, False), (143, 1, 143, False)]
    + [(code, 1, code, True) for code in sorted(DETERMINATE)],
)
def test_the_script_retries_and_alerts_by_exit_code(
    place: Place, code: int, times: int, ends: int, alerted: bool
) -> None:
    place.let_fail(code, times)
    assert place.sh(night(place)) == ends
    assert place.alerts == ([f"tickets.toml ended with exit code {ends}"] if alerted else [])
    left = (place.folder / "failing").read_text().count("x")
    assert times - left == (9 if times == 99 else times)


@pytest.mark.heavy
def test_a_real_refusal_is_an_alert_at_once(place: Place) -> None:
    (place.folder / "in.jsonl").unlink()
    assert place.sh(night(place)) == 2
    assert place.alerts == ["tickets.toml ended with exit code 2"]


# ── systemd ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def units(place: Place) -> dict[str, Path]:
    """The units, each in a file of the name that its first line says."""
    found = {}
    for text in blocks("ini"):
        name = re.match(r"# /etc/systemd/system/(\S+)", text)
        assert name is not None
        found[name[1]] = place.folder / name[1]
        found[name[1]].write_text(place.here(text).replace("/etc/batchrun", str(place.folder)))
    return found


def test_systemd_accepts_the_units_shown(place: Place) -> None:
    files = units(place)
    assert list(files) == ["batchrun-tickets.service", "batchrun-tickets.timer", "batchrun-alert@.service"]
    (place.folder / "key.env").write_text("VTRIX_API_KEY=secret\n")
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here; the units are read by configparser alone")
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *files.values()],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{place.folder}:"},
    )
    complaints = [line for line in ended.stderr.splitlines() if str(place.folder) in line or "batchrun" in line]
    assert complaints == []
    assert ended.returncode == 0, ended.stderr


@pytest.mark.heavy
def test_the_units_say_what_the_table_says(place: Place) -> None:
    read = configparser.ConfigParser(strict=True, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(units(place)["batchrun-tickets.service"])
    service = read["Service"]
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == DETERMINATE
    assert {int(code) for code in service["SuccessExitStatus"].split()} == {6, 130, 143}
    assert service["Restart"] == "on-failure"
    command = f"cd {service['WorkingDirectory']} && {service['ExecStart']}"
    assert place.sh(command) == 0
    assert len(place.runs()) == 1


# ── Kubernetes, GitHub ────────────────────────────────────────────────────────────────────────────────────────────────


def documents() -> dict[str, Any]:
    found = [yaml.safe_load(text) for text in blocks("yaml") if "# /etc/prometheus" not in text]
    return {each.get("kind", "workflow"): each for each in found}


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.heavy
def test_the_cron_job_retries_by_exit_code(place: Place) -> None:
    spec = documents()["CronJob"]["spec"]
    job = spec["jobTemplate"]["spec"]
    first, second = job["podFailurePolicy"]["rules"]
    assert first["action"] == "FailJob"
    assert set(first["onExitCodes"]["values"]) == DETERMINATE
    assert second["action"] == "Ignore"
    assert spec["concurrencyPolicy"] == "Forbid"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy wants it
    runs = container(job["template"])
    assert first["onExitCodes"]["containerName"] == runs["name"]
    assert [mount["name"] for mount in runs["volumeMounts"]] == [v["name"] for v in job["template"]["spec"]["volumes"]]
    path = f"{place.folder}/.venv/bin:/usr/bin:/bin"
    assert place.sh(f"cd {runs['workingDir']} && {' '.join(runs['command'])}", PATH=path) == 0
    assert len(place.runs()) == 1


def merge_commands() -> list[str]:
    return [text.strip() for text in blocks("sh") if text.startswith("batchrun merge")]


@pytest.mark.heavy
def test_each_index_runs_its_shard(place: Place) -> None:
    spec = documents()["Job"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert {rule["action"] for rule in spec["podFailurePolicy"]["rules"]} == {"FailIndex", "Ignore"}
    runs = container(spec["template"])
    shell, option, script = runs["command"]
    (count,) = re.findall(r"JOB_COMPLETION_INDEX/(\d+)", script)
    assert int(count) == spec["completions"]
    script = script.replace(f"/{count}", "/2")
    for index in range(2):
        environ = {"PATH": f"{place.folder}/.venv/bin:/usr/bin:/bin", "JOB_COMPLETION_INDEX": str(index)}
        ended = subprocess.run([shell, option, place.here(script)], cwd=place.folder, env=environ)
        assert ended.returncode == 0
        path = environ["PATH"]
        assert place.sh(f"cd {place.folder} && {merge_commands()[0]}", PATH=path) == (4 if index == 0 else 0)
    assert place.runs() == ["2026-11-28", "2026-11-28.shard-0-of-2", "2026-11-28.shard-1-of-2"]


# ── Slurm ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_the_tasks_of_the_array_are_the_shards(place: Place) -> None:
    script = block("bash", "#SBATCH")
    settings = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)", script, re.MULTILINE))
    (count,) = re.findall(r"SLURM_ARRAY_TASK_ID/(\d+)", script)
    assert settings["array"] == f"0-{int(count) - 1}"
    assert settings["signal"].startswith("B:TERM@")
    task = place.folder / "tickets.sbatch"
    task.write_text(place.here(script).replace(f"/{count}", "/2"))
    for number in range(2):
        assert place.sh(f"bash {task}", SLURM_ARRAY_TASK_ID=str(number), NIGHT="2026-11-28") == 0
    assert place.sh(f"bash {task}", NIGHT="2026-11-28") == 2  # no array: the variable is empty
    path = f"{place.folder}/.venv/bin:/usr/bin:/bin"
    assert place.sh(f"cd {place.folder} && {merge_commands()[1]}", PATH=path, NIGHT="2026-11-28") == 0
    merged = place.folder / "runs/tickets/2026-11-28/completions.parquet"
    assert pq.read_table(merged).column("row").to_pylist() == list(range(5))
    assert "\nexec .venv/bin/batchrun" in script  # else Slurm's signal would reach the shell alone


@pytest.mark.heavy
@pytest.mark.parametrize(("code", "ends"), [(0, 0), (6, 0), (4, 0), (5, 0), (1, 1), (2, 2), (3, 3), (7, 7), (143, 143)])
def test_the_workflow_fails_by_exit_code(place: Place, code: int, ends: int) -> None:
    workflow = documents()["workflow"]
    assert True in workflow  # YAML 1.1 reads the key `on` so; GitHub does not
    assert workflow["concurrency"] == "tickets"
    (job,) = workflow["jobs"].values()
    (step,) = [step for step in job["steps"] if step.get("name") == "run"]
    if code:
        place.let_fail(code)
    path = f"{place.folder}/.venv/bin:/usr/bin:/bin"
    script = f"set -eo pipefail\ncd {place.folder}\n{step['run']}"  # as GitHub starts bash
    assert place.sh(script, shell="bash", PATH=path) == ends
    restored, saved = (step for step in job["steps"] if step.get("uses", "").startswith("actions/cache/"))
    assert restored["with"]["path"] == saved["with"]["path"] == "runs"
    assert saved["if"] == "always()"


# ── Airflow ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_alerts_are_about_metrics_that_exist(tmp_path: Path) -> None:
    rules = block("yaml", "# /etc/prometheus")
    (group,) = yaml.safe_load(rules)["groups"]
    named = {name for rule in group["rules"] for name in re.findall(r"batchrun_\w+", rule["expr"])}
    assert len(named) >= 7
    assert named <= {metric.prometheus_name for metric in METRICS}
    if shutil.which("promtool"):
        (tmp_path / "rules.yml").write_text(rules)
        subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True)


def dags(place: Place) -> list[Path]:
    folder = place.folder / "dags"
    folder.mkdir()
    found = []
    for text in blocks("python"):
        name = re.match(r"# dags/(\S+)", text)
        assert name is not None
        found.append(folder / name[1])
        found[-1].write_text(place.here(text))
    return found


def test_the_operator_imports_airflow_late(place: Place) -> None:
    for file in dags(place):
        ast.parse(file.read_text())
    names: dict[str, Any] = {"__name__": "batchrun_operator"}
    exec(compile(block("python", "def verdict"), "batchrun_operator.py", "exec"), names)
    assert "airflow" not in sys.modules
    verdicts = {int(code): names["verdict"](int(code)) for code in ExitCode}
    assert {code for code, verdict in verdicts.items() if verdict == "fail"} == DETERMINATE
    assert {code for code, verdict in verdicts.items() if verdict in (None, "skip")} == {0, 6}


BY_AIRFLOW = """
import sys
from datetime import datetime, timezone
from airflow.dag_processing.dagbag import DagBag

bag = DagBag(sys.argv[1])
assert not bag.import_errors, bag.import_errors
for name in sorted(bag.dags):
    (task,) = bag.dags[name].tasks
    print(name, task.retries, task.retry_delay, type(task).__name__)
"""


@pytest.mark.skipif(not AIRFLOW.exists(), reason="Airflow is not installed; make airflow")
def test_airflow_runs_the_dags_shown(place: Place) -> None:
    (first, _, second) = dags(place)
    environ = {
        **os.environ,
        "AIRFLOW_HOME": str(place.folder / "home"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(first.parent),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "PYTHONPATH": str(first.parent),
    }

    def airflow(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(AIRFLOW), "-m", "airflow", *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, cwd=place.folder)

    listed = subprocess.run([AIRFLOW, "-c", BY_AIRFLOW, first.parent], env=environ, capture_output=True, text=True)
    assert "tickets 8 0:15:00 BashOperator" in listed.stdout, listed.stderr
    assert "tickets_by_operator 8 0:15:00 BatchrunOperator" in listed.stdout
    assert airflow("db", "migrate").returncode == 0
    for dag, date in ((first.stem, "2026-11-03"), (second.stem, "2026-11-04")):
        ended = airflow("dags", "test", dag, date)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert date in place.runs()
    place.let_fail(6)
    skipped = airflow("dags", "test", second.stem, "2026-11-05")
    assert "another start of this run is at work" in skipped.stdout + skipped.stderr
    place.let_fail(2)
    failed = airflow("dags", "test", second.stem, "2026-11-06")
    assert "a retry would end the same way" in failed.stdout + failed.stderr
