"""A result that is published in an object store, against a real S3 server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.errors import RunLockedError, StorageError
from batchrun.run_summary import Summary
from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun as command
from tests.cli_process import write_job, write_rows
from tests.s3_server import BUCKET, READER, SCOPED, S3Server, environ_for, environment
from tests.simulator_process import RunningSimulator, running_simulator

ROWS = 30


@pytest.fixture(scope="module")
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.001)) as simulator:
        yield simulator


class Machine:
    """A machine with a disk of its own, on which the job is run."""

    def __init__(
        self, disk: Path, api: RunningSimulator, to: str, more: str = "", *, rows: int = ROWS, output: str = ""
    ) -> None:
        disk.mkdir(exist_ok=True)
        self.state = disk / "state"
        source = write_rows(disk / "in.jsonl", rows)
        self.to = f"s3://{BUCKET}/{to}"
        self.job = write_job(disk / "job.toml", api.url, source, f"{more}\n[output]\npath = '{self.to}'\n{output}")

    def run(self, **options: Any) -> Summary:
        return batchrun.run(self.job, state_dir=self.state, **options)

    @property
    def directory(self) -> Path:
        return self.state / "s3" / self.to.removeprefix("s3://")


def sent(api: RunningSimulator) -> int:
    return len(api.ledger())


def test_the_result_is_published_whole_and_once(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    machine = Machine(tmp_path, api, "whole")
    s3.put(f"{BUCKET}/input/a.jsonl", (tmp_path / "in.jsonl").read_bytes())
    write_job(machine.job, api.url, f"s3://{BUCKET}/input/*.jsonl", f"[output]\npath = '{machine.to}'\n")
    summary = machine.run()
    assert summary.complete
    assert s3.names(f"{BUCKET}/whole") == ["_batchrun/run.json", "completions.parquet", "summary.json", "usage.parquet"]
    assert s3.read(f"{BUCKET}/whole/completions.parquet") == (machine.directory / "completions.parquet").read_bytes()
    assert json.loads(s3.read(f"{BUCKET}/whole/summary.json"))["files"] == summary.files
    assert summary.files["completions"] == f"s3://{BUCKET}/whole/completions.parquet"
    with s3.filesystem.open_input_file(f"{BUCKET}/whole/completions.parquet") as file:
        assert pq.read_table(file).num_rows == ROWS

    before = sent(api), s3.filesystem.get_file_info(f"{BUCKET}/whole/completions.parquet").mtime
    assert machine.run().complete
    assert (sent(api), s3.filesystem.get_file_info(f"{BUCKET}/whole/completions.parquet").mtime) == before


@pytest.mark.heavy
def test_another_machine_finds_the_run_complete(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    Machine(tmp_path / "one", api, "other").run()
    before = sent(api)
    other = Machine(tmp_path / "two", api, "other")
    assert other.run().complete
    assert sent(api) == before

    write_rows(tmp_path / "two" / "in.jsonl", ROWS + 1)
    with pytest.raises(RunLockedError, match="holds the complete result of another run"):
        other.run()
    checked = command("check", other.job, "--set", f"output.state_dir={other.state}")
    assert (checked.exit_code, "holds the complete result of another run" in checked.stderr) == (6, True), checked
    write_rows(tmp_path / "two" / "in.jsonl", ROWS)
    assert command("check", other.job, "--set", f"output.state_dir={tmp_path / 'three'}").exit_code == 0
    assert sent(api) == before


@pytest.mark.sampled(0)
@pytest.mark.heavy
def test_partitions_are_published_in_their_folders(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    machine = Machine(tmp_path, api, "by", output="partition_by = ['id']\n", rows=4)
    assert machine.run().complete
    names = s3.names(f"{BUCKET}/by")
    assert sum(name.startswith("completions/id=") for name in names) == 4, names
    assert "summary.json" in names
    assert not any(name.endswith(".part") for name in names)


@pytest.mark.heavy
def test_an_unwritable_place_costs_nothing(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """The run stops before its first request."""
    before = sent(api)
    for environ, to, problem in (
        (environ_for(s3.url, READER), "denied", "access is denied"),
        (environ_for(s3.url, (READER[0], "wrong")), "denied", "access is denied"),
        (environ_for("http://127.0.0.1:9"), "away", "NETWORK_CONNECTION"),
    ):
        with environment(environ), pytest.raises(StorageError, match=problem) as error:
            Machine(tmp_path, api, to).run()
        assert "\n" not in str(error.value)
    with pytest.raises(StorageError, match="no such bucket"):
        batchrun.run(Machine(tmp_path, api, "x").job, output="s3://no-such-bucket/x", state_dir=tmp_path)
    assert sent(api) == before


def test_check_tries_the_destination_first(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    before = sent(api)
    machine = Machine(tmp_path, api, "tried")
    at = ("--set", f"output.state_dir={machine.state}")
    for environ, to, problem in (
        (environ_for(s3.url, READER), machine.to, "access is denied"),
        (s3.environ, "s3://no-such-bucket/x", "there is no such bucket"),
    ):
        with environment(environ):
            ended = command("check", machine.job, *at, "--set", f"output.path={to}")
        assert (ended.exit_code, problem in ended.stderr) == (5, True), ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    ended = command("check", machine.job, *at)
    assert ended.exit_code == 0, ended.stderr
    assert s3.names(f"{BUCKET}/tried") == []
    assert not machine.state.exists()
    assert sent(api) == before


@pytest.mark.heavy
def test_credentials_for_one_prefix_are_enough(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """They may not list the bucket, nor ask for it, as those of a team in a bucket that several share."""
    s3.put(f"{BUCKET}/team/in.jsonl", b'{"text": "a", "lang": "de"}\n{"text": "b", "lang": "en"}\n')
    output = f"path = 's3://{BUCKET}/team/out'\nkeep_parts_remote = true\nmax_failures = 2\n"
    output += f"partition_by = ['lang']\ndataset = 's3://{BUCKET}/team/labels'\n"
    job = write_job(tmp_path / "job.toml", api.url, f"s3://{BUCKET}/team/*.jsonl", f"[output]\n{output}")
    with environment(environ_for(s3.url, SCOPED)):
        assert command("check", job).exit_code == 0
        ended = command("run", job, "--state-dir", tmp_path)
        assert ended.exit_code == 0, ended.stderr
        ended = command("check", job, "--set", f"output.path=s3://{BUCKET}/others/out")
    assert (ended.exit_code, "access is denied" in ended.stderr) == (5, True), ended.stderr
    assert len([name for name in s3.names(f"{BUCKET}/team") if name.endswith("part-000000.parquet")]) == 4


@pytest.mark.heavy
def test_the_command_line_finds_what_it_published(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    machine = Machine(tmp_path, api, "cli/{job}/{date}")
    shown = command("run", machine.job, "--state-dir", machine.state, "--date", "2026-11-22", "--limit", "10")
    assert shown.exit_code == 0, shown.stderr
    assert f"s3://{BUCKET}/cli/job/2026-11-22/completions.parquet" in shown.stdout
    shown = command("run", machine.job, "--state-dir", machine.state, "--date", "2026-11-22")
    assert (shown.exit_code, "30 of 30 done" in shown.stdout) == (0, True), shown.stderr
    published = s3.read(f"{BUCKET}/cli/job/2026-11-22/summary.json")
    assert json.loads(published)["rows_in_output"] == ROWS
    shown = command("run", machine.job, "--state-dir", machine.state, "--date", "2026-11-22", "--new", "--limit", "5")
    assert shown.exit_code == 0, shown.stderr
    assert s3.names(f"{BUCKET}/cli/job/2026-11-22-2")[-1] == "usage.parquet"

    shown = command("report", f"s3://{BUCKET}/cli", "--by", "run", "--format", "json")
    assert shown.exit_code == 0, shown.stderr
    assert len(json.loads(shown.stdout)["lines"]) == 2
    assert f"s3://{BUCKET}/cli/job/2026-11-22-2" in command("status", f"s3://{BUCKET}/cli").stdout
    shown = command("show", f"s3://{BUCKET}/cli/job/2026-11-22", "--row", "3", "--json")
    assert json.loads(shown.stdout)["row"] == 3, shown.stderr
    shown = command("report", f"s3://{BUCKET}/nothing")
    assert (shown.exit_code, "no run is published there" in shown.stderr) == (2, True), shown.stderr
