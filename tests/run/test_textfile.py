"""The file for node_exporter: there while a run works and after each of its ends, whole, readable, one for each job."""

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from batchrun.job.load import load
from batchrun.simulator import SimulatorConfig
from batchrun.store.rundir import RunDirectory
from batchrun.telemetry.side_thread import SideThread
from batchrun.telemetry.textfile import TextFile
from batchrun.telemetry.views import Views
from tests.cli_process import KEY, Ended, batchrun, finish, read_summary, start, wait_until, write_job, write_rows
from tests.run.test_progress import summary
from tests.simulator_process import RunningSimulator, running_simulator


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02)) as running:
        yield running


class Night:
    """A job whose figures go into `metrics`."""

    def __init__(self, folder: Path, url: str, rows: int = 5, name: str = "night", more: str = "") -> None:
        self.out = folder / f"{name}-out"
        self.metrics = folder / "metrics"
        self.file = self.metrics / f"batchrun-{name}.prom"
        source = write_rows(folder / f"{name}.jsonl", rows)
        settings = f'[telemetry]\nprometheus_dir = "{self.metrics}"\n{more}'
        self.job = write_job(folder / f"{name}.toml", url, source, settings)

    def run(self, *arguments: str, key: str = KEY) -> Ended:
        return batchrun("run", self.job, "-o", self.out, *arguments, key=key)

    def value(self, name: str, **labels: str) -> float | None:
        """The sum of the samples with these labels; None without one."""
        values = [
            sample.value
            for family in text_string_to_metric_families(self.file.read_text())
            for sample in family.samples
            if sample.name == f"batchrun_{name}" and labels.items() <= sample.labels.items()
        ]
        return sum(values) if values else None


@pytest.fixture
def night(simulator: RunningSimulator, tmp_path: Path) -> Night:
    (tmp_path / "metrics").mkdir()
    return Night(tmp_path, simulator.url)


def test_a_complete_run_leaves_its_figures(night: Night) -> None:
    before = os.umask(0o077)
    try:
        assert night.run().exit_code == 0
    finally:
        os.umask(before)
    written = read_summary(night.out)
    assert night.value("rows") == 5
    assert night.value("exit_code") == 0
    assert night.value("run_state", state="complete") == 1
    assert night.value("cost_dollars_total") == float(written["cost_usd"])
    assert night.value("tokens_total") == sum(line["total_tokens"] for line in written["totals"])
    assert night.value("last_success_timestamp_seconds") == night.value("end_timestamp_seconds") is not None
    assert stat.S_IMODE(night.file.stat().st_mode) == 0o644, "node_exporter is another user"
    assert [file.name for file in night.metrics.iterdir() if not file.name.startswith(".")] == [night.file.name]
    if shutil.which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=night.file.read_bytes(), check=True)


def test_the_file_is_there_while_the_run_works(simulator: RunningSimulator, tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    night = Night(tmp_path, simulator.url, rows=400, more="[limits]\nrequests_per_minute = 600\n")
    process = start("run", night.job, "-o", night.out)
    wait_until(lambda: night.file.exists() and night.value("rows", status="ok"), process)
    assert night.value("exit_code") is None
    assert night.value("run_state", state="running") == 1
    assert night.value("circuit_state", state="sending") == 1
    assert night.value("request_rate_limit_per_second") == 10
    assert night.value("in_flight_requests_limit") is not None
    process.send_signal(signal.SIGTERM)
    assert finish(process).exit_code == 143
    assert night.value("exit_code") == 143
    assert night.value("run_state", state="stopped") == 1
    assert night.value("last_success_timestamp_seconds") is None
    assert night.value("request_rate_per_second") is None, "nothing is sent any more"
    assert night.value("rows") == 400 - (night.value("pending_rows") or 0) > 0


def test_the_last_success_outlives_failed_nights(night: Night) -> None:
    assert night.run().exit_code == 0
    success = night.value("last_success_timestamp_seconds")
    assert night.run("--new", "-o", str(night.out.with_name("second")), "--set", "input.min_rows=9").exit_code == 2
    assert night.value("exit_code") == 2
    assert night.value("run_state", state="failed") == 1
    assert night.value("last_success_timestamp_seconds") == success
    assert night.run("-o", str(night.out.with_name("third")), key="").exit_code == 2, "no key: before any summary"
    assert night.value("exit_code") == 2
    assert night.value("last_success_timestamp_seconds") == success
    assert night.run().exit_code == 0, "complete already"
    assert night.value("exit_code") == 0
    assert night.value("rows") == 5
    assert night.value("last_success_timestamp_seconds") == success


def test_two_jobs_have_two_files(night: Night, simulator: RunningSimulator) -> None:
    other = Night(night.metrics.parent, simulator.url, rows=3, name="day")
    assert [night.run().exit_code, other.run().exit_code] == [0, 0]
    assert night.value("rows", job="night") == 5
    assert other.value("rows", job="day") == 3


def test_each_shard_has_a_file_and_a_label(night: Night) -> None:
    for number in (0, 1):
        assert night.run("--shard", f"{number}/2").exit_code == 0
    files = sorted(file.name for file in night.metrics.glob("*.prom"))
    assert files == ["batchrun-night.shard-0-of-2.prom", "batchrun-night.shard-1-of-2.prom"]
    rows = []
    for name in files:
        night.file = night.metrics / name
        rows.append([night.value("rows", job="night", shard=f"{number}/2") for number in (0, 1)])
    assert rows == [[3, None], [None, 2]]


def test_an_unpublished_result_is_no_success(night: Night) -> None:
    """The run is complete here, and then the object store refuses its result."""
    views = Views(load(night.job), RunDirectory(night.out), print)
    complete = summary(job="night", state="complete", exit_code=0, complete=True, pending=0)
    views.show(complete)
    assert night.value("exit_code") is None
    assert night.value("run_state", state="writing") == 1
    views.end(5, "the store can't be reached", None)
    assert night.value("exit_code") == 5
    assert night.value("run_state", state="failed") == 1
    assert night.value("last_success_timestamp_seconds") is None
    again = Views(load(night.job), RunDirectory(night.out), print)
    again.show(complete)
    again.end(0, None, complete)
    assert night.value("exit_code") == 0
    assert night.value("last_success_timestamp_seconds") == complete.updated_at.timestamp()


def test_a_second_run_leaves_the_file_alone(night: Night) -> None:
    """It stays the first run's, while both work."""
    with open(night.metrics / ".batchrun-night.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = night.run()
    assert ended.exit_code == 0
    assert ended.stderr.count("another run of this job writes") == 1
    assert not night.file.exists()


@pytest.mark.parametrize("problem", ["missing", "not a folder"])
def test_an_unwritable_folder_is_one_warning(simulator: RunningSimulator, tmp_path: Path, problem: str) -> None:
    night = Night(tmp_path, simulator.url)
    if problem == "not a folder":
        night.metrics.write_text("")
    ended = night.run()
    assert ended.exit_code == 0
    (warning,) = [line for line in ended.stderr.splitlines() if "prometheus_dir" in line]
    assert warning.startswith(f"warning: telemetry.prometheus_dir: {night.file} can't be written: No")


@pytest.mark.parametrize(
    ("one", "other"), [("a b", "a_b"), ("a/b", "a%2Fb"), ("é", "e"), ("x" * 300, "x" * 301), ("\udce9", "\udcea\udceb")]
)
def test_each_job_has_a_file_of_its_own(tmp_path: Path, one: str, other: str) -> None:
    paths = [TextFile(tmp_path, job, print).path for job in (one, other)]
    assert paths[0] != paths[1]
    for path in paths:
        assert path.parent == tmp_path
        path.with_name(f".{path.name}.longest").touch()


def test_a_file_system_that_hangs_delays_nothing(simulator: RunningSimulator, tmp_path: Path) -> None:
    """A pipe that no one reads stands for a mount whose server is gone: opening it never returns."""
    night = Night(tmp_path, simulator.url, rows=40)
    night.metrics.mkdir()
    os.mkfifo(night.metrics / ".batchrun-night.lock")
    ended = night.run()
    assert ended.exit_code == 0
    (warning,) = [line for line in ended.stderr.splitlines() if "prometheus_dir" in line]
    assert warning == f"warning: telemetry.prometheus_dir: {night.metrics} does not answer"
    assert read_summary(night.out)["elapsed_s"] < 20


def test_a_hanging_write_is_waited_for_once() -> None:
    """Then the newest figures count."""
    done: list[int] = []
    hung: list[None] = []
    answers = threading.Event()
    side_thread = SideThread(lambda: hung.append(None), wait_s=0.01)
    side_thread.do(lambda: done.append(0) if answers.wait(60) else None)
    for number in (1, 2, 3):
        side_thread.do(lambda number=number: done.append(number))  # type: ignore[misc]
    assert (done, len(hung)) == ([], 1)
    answers.set()
    wait_until(lambda: done == [0, 3])
    finished = SideThread(lambda: hung.append(None), wait_s=60)
    finished.do(lambda: done.append(4))
    assert done == [0, 3, 4]
    finished.do(lambda: done.append(5), last=True)
    assert (done, len(hung)) == ([0, 3, 4, 5], 1)
