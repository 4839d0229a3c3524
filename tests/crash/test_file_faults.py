"""Disks that fail at a chosen call, that are full, and processes that are stopped or short of descriptors."""

import ast
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchrun.simulator import SimulatorConfig
from batchrun.store.checkpoint import Checkpoint
from tests.cli_process import KEY, KEY_ENV, batchrun, finish, kill_when, read_summary, start, write_job, write_rows
from tests.crash.strace import MISSING, Fault, prefix
from tests.crash.trial import ROWS, Calm, Trial, calm_run, simulator_config
from tests.simulator_process import running_simulator

FEW = 60
"""Rows of a run that suffers: four chunks."""

SYNC = "fsync,fdatasync"
RENAME = "?rename,?renameat,?renameat2"  # which of them it is depends on the processor

PARTS = tuple(f"parts/{chunk:06d}.g1.parquet.tmp" for chunk in range(4))
INPUTS = tuple(f"parts/{chunk:06d}.input.arrow.tmp" for chunk in range(4))
NAMED_PARTS, NAMED_INPUTS = (tuple(file.removesuffix(".tmp") for file in files) for files in (PARTS, INPUTS))
WAL = ("checkpoint.db-wal",)
RESULT = ("completions.parquet.tmp",)
USAGE = ("usage.parquet.tmp",)

PAUSING = {
    "the new database": (
        Fault("openat", ("checkpoint.db",), "EIO", "1"),
        Fault(SYNC, ("checkpoint.db-journal",), "EIO", "1"),
        Fault("pwrite64", ("checkpoint.db",), "ENOSPC", "1+"),
        Fault(SYNC, ("checkpoint.db",), "EIO", "1"),
    ),
    "the database at rest": (Fault("pwrite64", ("checkpoint.db",), "EIO", "3"),),
    "the write-ahead log": (  # commits first: a busy machine groups the last rows in fewer than five
        Fault(SYNC, WAL, "EIO", "6"),
        Fault(SYNC, WAL, "EIO", "5+"),
        Fault("pwrite64", WAL, "EIO", "40"),
        Fault("pwrite64", WAL, "ENOSPC", "60"),
        Fault("pwrite64", WAL, "ENOSPC", "30+"),
    ),
    "the stored input": (
        Fault("write", INPUTS, "EIO", "5"),
        Fault(SYNC, INPUTS, "EIO", "2"),
        Fault("write", INPUTS, "ENOSPC", "1+"),
        Fault(RENAME, INPUTS, "EIO", "1"),
        Fault("openat", NAMED_INPUTS, "EIO", "1"),
    ),
    "a part": (
        Fault("write", PARTS, "EIO", "30"),
        Fault(SYNC, PARTS, "EIO", "1"),
        Fault(RENAME, PARTS, "EIO", "1"),
        Fault("write", PARTS, "ENOSPC", "50+"),
        Fault("openat", NAMED_PARTS, "EIO", "1"),
    ),
    "the result": (
        Fault("write", RESULT, "EIO", "20"),
        Fault(SYNC, RESULT, "EIO", "1"),
        Fault(RENAME, RESULT, "EIO", "1"),
        Fault("write", USAGE, "ENOSPC", "1+"),
        Fault(SYNC, USAGE, "EIO", "1"),
        Fault(RENAME, USAGE, "ENOSPC", "1"),
    ),
    "the directories": (
        Fault(SYNC, ("parts",), "EIO", "2"),
        Fault(SYNC, ("",), "EIO", "5"),
    ),
    "the log and the slots": (
        Fault("openat", ("run.log",), "ENOSPC", "1"),
        Fault("openat", ("inflight.bin",), "EIO", "1"),
        Fault("fallocate", ("inflight.bin",), "ENOSPC", "1"),
    ),
}
"""Faults one after another upon one run, each met by a process that resumes what the last one left."""

HARMLESS = {
    "summary.json": (
        Fault("write", ("summary.json.tmp",), "ENOSPC", "1..2"),
        Fault(SYNC, ("summary.json.tmp",), "EIO", "1..2"),
        Fault(RENAME, ("summary.json.tmp",), "EIO", "1..2"),
    ),
    "run.log": (
        Fault("write", ("run.log",), "EIO", "1"),
        Fault("write", ("run.log",), "ENOSPC", "2+"),
    ),
    "the reserve": (Fault("fallocate", ("reserve.bin",), "ENOSPC", "1"),),
}
"""Faults that a run survives."""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return calm_run(tmp_path_factory.mktemp("calm"), FEW)


@contextmanager
def trial(folder: Path, rows: int = FEW) -> Iterator[Trial]:
    with running_simulator(simulator_config(folder / "ledger")) as simulator:
        yield Trial(folder / "run", simulator, rows=rows)


def recover(run: Trial, calm: Calm) -> None:
    """The same command without faults completes the run, and the ledger bears it out."""
    if run.converge():
        run.start_again()
        run.judge(calm.output)
    assert run.outcome.violations == []


def test_strace_is_installed_for_these_tests() -> None:
    assert shutil.which("strace"), MISSING


@pytest.mark.heavy
@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", PAUSING)
def test_a_failing_disk_pauses_without_losses(kind: str, tmp_path: Path, calm: Calm) -> None:
    """One line names the disk's error, and no answer is lost."""
    with trial(tmp_path) as run:
        for fault in PAUSING[kind]:
            ended = run.suffer(prefix(fault, run.out))
            assert "INJECTED" in run.out.with_name("strace.log").read_text("utf-8", "replace"), f"{fault}: was not met"
            assert ended.exit_code == 5, f"{fault}: {ended}"
            *notes, error = ended.stderr.splitlines()
            assert error.startswith(f"Error: {run.out}"), f"{fault}: {ended}"
            assert not any("rror" in note for note in notes), f"{fault}: {ended}"
            if (run.out / "summary.json").exists() and not fault.files[0].startswith("checkpoint"):
                lost = [entry for entry in read_summary(run.out)["possibly_billed"] if entry["cause"] == "aborted"]
                assert not lost, f"{fault}: the answers in flight could have been kept"
        recover(run, calm)


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", HARMLESS)
def test_files_that_only_report_may_fail(kind: str, tmp_path: Path, calm: Calm) -> None:
    for number, fault in enumerate(HARMLESS[kind]):
        folder = tmp_path / str(number)
        folder.mkdir()
        with trial(folder) as run:
            ended = run.suffer(prefix(fault, run.out))
            assert "INJECTED" in run.out.with_name("strace.log").read_text("utf-8", "replace"), f"{fault}: was not met"
            assert ended.exit_code == 0, f"{fault}: {ended}"
            assert "rror" not in ended.stderr
            recover(run, calm)


@pytest.mark.heavy
def test_after_one_failed_fsync_nothing_more_is_committed(tmp_path: Path, calm: Calm) -> None:
    with trial(tmp_path) as run:
        log = run.out.with_name("strace.log")
        fault = Fault(SYNC, WAL, "EIO", "12")
        command = prefix(fault, run.out, also=("pwrite64",))
        assert run.suffer(command).exit_code == 5
        before, injected, after = log.read_text("utf-8", "replace").partition("INJECTED")
        assert "pwrite64" in before
        assert injected
        assert "pwrite64" not in after, "the log was written to after its fsync had failed"
        recover(run, calm)


def test_a_torn_spill_is_cut_before_appending(tmp_path: Path) -> None:
    spilled = tmp_path / "spill.bin"
    spilled.write_bytes(b"\xff\x00\x00\x00\x01\x02\x03\x04torn")
    Checkpoint(tmp_path / "checkpoint.db", free_reserve=lambda: False).close()
    assert not spilled.exists()


@contextmanager
def small_disk(at: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own."""
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "small", str(at)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the limit on file sizes is tested in test_end_to_end.py")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize("kilobytes", [1_000, 16_400], ids=["no room for the reserve", "with the reserve"])
def test_a_full_file_system_pauses_the_run(tmp_path: Path, kilobytes: int) -> None:
    """With room again, the run resumes."""
    calm = calm_run(tmp_path, ROWS)
    with (
        small_disk(tmp_path / "disk", kilobytes) as disk,
        running_simulator(simulator_config(tmp_path / "ledger")) as simulator,
    ):
        run = Trial(disk / "run", simulator)
        ended = run.suffer([])
        assert ended.exit_code == 5, ended
        assert "make room and run the same command again" in ended.stderr.splitlines()[-1]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        recover(run, calm)


@pytest.mark.heavy
def test_a_stopped_process_resumes_without_storm(tmp_path: Path) -> None:
    """SIGSTOP and SIGCONT cause no false timeouts and no burst of requests."""
    source = write_rows(tmp_path / "in.jsonl", 150)
    per_second, timeout_s = 30, 1.5
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(
            tmp_path / "job.toml", simulator.url, source, f"[limits]\nrequests_per_minute = {per_second * 60}"
        )
        timeout = f"endpoint.attempt_timeout_s={timeout_s}"
        process = start("run", job, "-o", tmp_path / "out", "--set", timeout)
        kill_when(process, lambda: len(simulator.ledger()) >= 40, signal.SIGSTOP)
        time.sleep(2 * timeout_s)
        process.send_signal(signal.SIGCONT)
        ended = finish(process)
        assert ended.exit_code == 0, ended.stderr
        ledger = simulator.ledger()
    assert len(ledger) == 150, "answers that had come while it was stopped were thrown away"
    assert read_summary(tmp_path / "out")["possibly_billed_count"] == 0
    seconds = Counter(int(line.time_s) for line in ledger)
    assert max(seconds.values()) <= 2 * per_second + 8, "the pause was made up for in a rush"


@pytest.mark.heavy
def test_too_few_file_descriptors_fail_no_row(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 300)
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 200")
        few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))  # noqa: E731
        ended = batchrun("run", job, "-o", tmp_path / "out", preexec_fn=few)
        assert ended.exit_code in (0, 5), ended
        assert read_summary(tmp_path / "out")["by_status"].keys() <= {"ok", "truncated"}
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
    assert read_summary(tmp_path / "out")["by_status"].keys() == {"ok", "truncated"}


@pytest.fixture(scope="module")
def simulator() -> Iterator[str]:
    """Its address."""
    with running_simulator() as started:
        yield started.url


OUTPUTS = {"file": "", "lines": '[output]\nformat = "jsonl"', "folders": '[output]\npartition_by = ["text"]'}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS.keys())
def test_any_bytes_in_names_work(output: str, tmp_path: Path, simulator: str) -> None:
    """In those of the job, its input and its run directory: each command works."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    source = write_rows(folder / os.fsdecode(b"\xff.jsonl"), 12)
    job = write_job(folder / os.fsdecode(b"\xfe.toml"), simulator, "-i", output)
    out, again = folder / os.fsdecode(b"o\xfft"), folder / "again"

    def works(*arguments: str | Path, exit_code: int = 0) -> str:
        ended = batchrun(*arguments)
        assert ended.exit_code == exit_code, ended
        assert "\\udc" not in ended.stderr
        return ended.stdout

    works("run", job, "-i", source, "-o", out, "--limit", "5")
    if output:
        works("run", job, "-i", source, "-o", out)
        works("verify", out)
        return
    works("run", job, "-i", source, "-o", out, "--deadline", "0.01s", exit_code=4)
    works("export", out)
    (stopped,) = json.loads(works("status", folder, "--json"))
    assert stopped["path"].endswith("caf\\xe9/o\\xfft")
    environ = {**os.environ, KEY_ENV: KEY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"{stopped['next']} --limit 6"], env=environ, check=True)
    works("run", job, "-i", source, "-o", out)
    works("run", job, "-i", source, "-o", again, "--reuse", out)
    assert read_summary(again)["reused"] == read_summary(out)["by_status"]["ok"] > 0
    for command in (("status", out), ("verify", out), ("show", out), ("compare", out, again)):
        works(*command)
    for ending in ("csv", "json", "md", "txt", "parquet", "html", "xlsx"):
        works("report", folder, "-o", folder / f"bill.{ending}")


def test_check_names_standard_input_and_not_its_copy(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.toml", "simulator", "-", "")
    (tmp_path / "piped").write_text("{}\nno\n", "utf-8")
    with (tmp_path / "piped").open("rb") as piped:
        ended = batchrun("check", job, "-i", "-", stdin=piped)
    assert ended.exit_code == 2
    assert "standard input:2: the JSON ends too early" in ended.stderr
    assert "/tmp" not in ended.stderr.replace(str(tmp_path), "")


WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today"}

PACES = {
    *("limits.token_bucket", "limits.admission", "limits.deadline", "limits.forecast", "limits.gate", "limits.outage"),
    *("limits.adaptive_rate", "limits.crowding", "limits.in_flight", "limits.useful_in_flight", "limits.rate_search"),
    *("limits.refusals", "limits.budget", "limits.circuit", "limits.rate_climb", "limits.measured_rate", "policy"),
    *("dispatch.dispatch", "dispatch.backlog", "dispatch.heartbeat", "dispatch.worker", "dispatch.endings"),
    "dispatch.shutdown",
}
"""The modules that wait, limit or give up. Their clock is the event loop's: a jump of the system's does not move it."""


def test_no_timer_uses_the_wall_clock() -> None:
    """No wait, limit or deadline changes when the wall clock is moved."""
    looks = set()
    package = Path(__file__).parents[2] / "batchrun"
    files = {".".join(file.relative_to(package).with_suffix("").parts): file for file in package.rglob("*.py")}
    for module, file in files.items():
        source = file.read_text("utf-8")
        if not any(f".{name}" in source for name in WALL_CLOCKS):
            continue
        for node in ast.walk(ast.parse(source)):
            match node:
                case ast.Attribute(value=ast.Name(id="time" | "datetime" | "date"), attr=name) if name in WALL_CLOCKS:
                    looks.add(module)
    assert files.keys() > PACES
    assert "dispatch.run_status" in looks, "the search finds nothing"
    assert looks.isdisjoint(PACES)
