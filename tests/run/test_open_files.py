"""Few file descriptors: fewer connections, said so; no row fails of them."""

import resource
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun import open_files
from batchrun.errors import ExitCode
from batchrun.open_files import OpenFiles
from batchrun.simulator import SimulatorConfig
from tests.cli_process import Ended, batchrun, finish, start, wait_until, write_job, write_rows
from tests.simulator_process import running_simulator

ROWS = 300


def run_with(limit: int, folder: Path, more: str = "") -> Ended:
    """A run of small chunks in a process that may open so many files."""
    with running_simulator(SimulatorConfig(latency_s=0.02, latency_sigma=0)) as simulator:
        chunks = "[output]\nchunk_rows = 40\n"
        job = write_job(folder / "job.toml", simulator.url, write_rows(folder / "in.jsonl", ROWS), chunks + more)
        few = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh"]
        return batchrun("run", job, "-o", folder / "out", before=few)


@pytest.mark.heavy
@pytest.mark.parametrize("limit", [open_files.FEWEST, 40, 64])
def test_few_descriptors_mean_fewer_connections(tmp_path: Path, limit: int) -> None:
    """No row fails."""
    ended = run_with(limit, tmp_path)
    assert ended.exit_code == ExitCode.COMPLETE, ended
    assert f"open files limit {limit}: " in ended.stderr
    assert " instead of 64; raise with ulimit -n" in ended.stderr
    assert set(pq.read_table(tmp_path / "out/completions.parquet").column("attempts").to_pylist()) == {1}


@pytest.mark.heavy
def test_a_sufficient_limit_is_not_mentioned(tmp_path: Path) -> None:
    ended = run_with(256, tmp_path)
    assert ended.exit_code == ExitCode.COMPLETE, ended
    assert "open files" not in ended.stderr


@pytest.mark.heavy
def test_the_soft_limit_is_raised(tmp_path: Path) -> None:
    ended = run_with(64, tmp_path)
    assert "open files limit 64" in ended.stderr
    (tmp_path / "again").mkdir()
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl")
        soft = ["sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh"]
        ended = batchrun("run", job, "-o", tmp_path / "again/out", before=soft)
    assert ended.exit_code == ExitCode.COMPLETE
    assert "open files" not in ended.stderr


@pytest.mark.heavy
def test_a_low_limit_is_refused_before_starting(tmp_path: Path) -> None:
    ended = run_with(24, tmp_path)
    assert ended.exit_code == ExitCode.PAUSED
    assert f"Error: open files limit 24: too few, a run needs {open_files.FEWEST}" in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_descriptors_of_others_fail_no_row(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.2, latency_sigma=0)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, write_rows(tmp_path / "in.jsonl", ROWS))
        process = start("run", job, "-o", tmp_path / "out")
        flying = tmp_path / "out/inflight.bin"
        wait_until(lambda: flying.exists() and any(flying.read_bytes()), process)
        open_now = sum(1 for _ in Path(f"/proc/{process.pid}/fd").iterdir())
        before = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (open_now, before[1]))  # as if all others were taken
        recorded = tmp_path / "out/checkpoint.db-wal"
        wait_until(lambda: b"Too many open files" in recorded.read_bytes(), process)
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, before)
        ended = finish(process)
    assert ended.exit_code == ExitCode.COMPLETE, ended
    assert set(pq.read_table(tmp_path / "out/completions.parquet").column("status").to_pylist()) <= {"ok", "truncated"}


def test_connections_fit_the_descriptor_limit() -> None:
    files = OpenFiles()
    assert files.connections(1) == 1
    assert files.connections(10**9) <= files.limit - open_files.SPARE
    assert files.shortage(64, 1) == f"open files limit {files.limit}: 1 connection instead of 64; raise with ulimit -n"
