import json
import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import msgspec
import pytest

from batchrun.errors import DiskError, ExitCode, JobError, RunLockedError
from batchrun.store import run_path
from batchrun.store.rundir import RunDirectory, file_system
from tests.jobs import job_over

LATE = datetime(2026, 11, 22, 23, 50)
EARLY = datetime(2026, 11, 23, 0, 10)


def start(path: Path, *, complete: bool = False, job: str = "reviews") -> Path:
    """A run directory as far as `choose` looks into it."""
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps({"job": job, "complete": complete}))
    return path


def placed(pattern: str, *, date: str | None = None, now: datetime = LATE, new: bool = False) -> tuple[str, str | None]:
    job = job_over(None)
    output = msgspec.structs.replace(job.output, path=pattern)  # as -o does it, unlike a job file without validation
    job = msgspec.structs.replace(job, name="reviews", output=output)
    path, resumed = run_path.choose(job, date=date, now=now, new=new)
    return str(path), resumed


# ── the place ─────────────────────────────────────────────────────────────────────────────────────────────────────────

PATTERNS = [
    "runs/{job}/{date}",
    "./runs/{job}/{date}/",
    "{date}",
    "a-{date}-b/{job}",
    "x/{date}/{job}/{date}",
    "[x]/{date}[*]",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("absolute", [False, True])
def test_a_run_resumes_after_midnight(tmp_path: Path, pattern: str, absolute: bool) -> None:
    pattern = f"{tmp_path}/{pattern}" if absolute else pattern
    first, resumed = placed(pattern)
    assert "2026-11-22" in first
    assert resumed is None
    start(Path(first))
    assert placed(pattern, now=EARLY) == (first, "2026-11-22")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_complete_run_frees_the_next_day(pattern: str) -> None:
    start(Path(placed(pattern)[0]), complete=True)
    path, resumed = placed(pattern, now=EARLY)
    assert path == str(Path(pattern.replace("{job}", "reviews").replace("{date}", "2026-11-23")))
    assert resumed is None


def test_only_the_newest_own_run_is_resumed() -> None:
    start(Path("runs/2026-11-19"))
    start(Path("runs/2026-11-20"), complete=True)
    assert placed("runs/{date}") == ("runs/2026-11-22", None)
    start(Path("runs/2026-11-21"), job="others")
    assert placed("runs/{date}") == ("runs/2026-11-22", None)


def test_names_resembling_dates_are_no_runs() -> None:
    for name in ("2026-11-21-old", "backup", "2026-1-1", "x2026-11-21"):
        start(Path("runs") / name)
    (Path("runs") / "2026-11-20").mkdir()  # nothing is known of it
    assert placed("runs/{date}") == ("runs/2026-11-22", None)


def test_a_given_date_is_always_used() -> None:
    start(Path("runs/2026-11-21"))
    assert placed("runs/{date}", date="2026-10-01") == ("runs/2026-10-01", None)


@pytest.mark.parametrize("date", ["yesterday", "2026-13-01", "2026-02-30", "26-11-22", "2026-11-22/..", "2026-11-22-"])
def test_an_invalid_date_is_refused(date: str) -> None:
    with pytest.raises(JobError, match="expected YYYY-MM-DD"):
        placed("runs/{date}", date=date)


def test_new_runs_of_a_day_are_numbered() -> None:
    """The last one is resumed."""
    for expected in ("runs/2026-11-22", "runs/2026-11-22-2", "runs/2026-11-22-3"):
        assert placed("runs/{date}", new=True) == (expected, None)
        start(Path(expected))
    assert placed("runs/{date}") == ("runs/2026-11-22-3", "2026-11-22-3")
    for number in range(4, 11):
        start(Path(f"runs/2026-11-22-{number}"))
    assert placed("runs/{date}", now=EARLY) == ("runs/2026-11-22-10", "2026-11-22-10")  # not "-9": numbers, not text


def test_new_takes_an_explicit_date_too() -> None:
    start(Path("runs/2026-10-01"))
    assert placed("runs/{date}", date="2026-10-01", new=True) == ("runs/2026-10-01-2", None)


def test_new_needs_a_place_of_its_own() -> None:
    assert placed("runs/fixed", new=True) == ("runs/fixed", None)
    start(Path("runs/fixed"))
    with pytest.raises(JobError, match=r"has no \{date\}"):
        placed("runs/fixed", new=True)


def test_a_place_without_date_is_constant() -> None:
    start(Path("out"))
    assert placed("out") == placed("./out/") == placed("out", now=EARLY) == ("out", None)


def test_an_unknown_placeholder_is_named() -> None:
    with pytest.raises(JobError, match=r"output\.path: \{day\} is not known"):
        placed("runs/{day}")


# ── the directory ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_directory_is_private_and_may_exist(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "a" / "b")
    directory.create()
    directory.create()
    assert directory.path.stat().st_mode & 0o777 == directory.parts.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", ["out", "out/below", "out/below/it"])
def test_a_file_in_the_way_is_reported_early(where: str) -> None:
    Path("out").write_text("mine")
    with pytest.raises(JobError, match="a file is in the way; choose another directory with -o"):
        RunDirectory(Path(where)).create()
    assert Path("out").read_text() == "mine"


def test_an_unusable_place_is_reported(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="/proc/batchrun: can't make the run directory"):
        RunDirectory(Path("/proc/batchrun")).create()


def mounted(tmp_path: Path, kind: str) -> Path:
    """A mountinfo that says `tmp_path` is of this kind."""
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /data rw,noatime shared:1 - {kind} server:/export rw\n"
    (tmp_path / "mountinfo").write_text(f"1 0 0:9999 / / rw - ext4 /dev/root rw\n{line}")
    return tmp_path / "mountinfo"


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(JobError, match=rf"is on a network file system \({kind}\)"):
        RunDirectory(tmp_path / "out").create(mounted(tmp_path, kind))


def test_local_file_systems_have_their_kernel_names(tmp_path: Path) -> None:
    assert file_system(tmp_path, mounted(tmp_path, "xfs")) == "xfs"
    RunDirectory(tmp_path / "out").create(mounted(tmp_path, "xfs"))
    assert file_system(Path("/proc")) == "proc"
    assert file_system(tmp_path, tmp_path / "missing") == ""


# ── the lock ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HOLD = """
import sys, time
from pathlib import Path
from batchrun.store.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    """Kill -9 leaves no lock behind."""
    directory = RunDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(RunLockedError, match="it has just started"), directory.lock():
            pytest.fail("two hold the lock")
        summary = {"pid": process.pid, "host": "here", "started_at": "2026-11-22T06:00:00Z"}
        directory.summary.write_text(json.dumps(summary))
        with pytest.raises(RunLockedError, match=f"pid {process.pid} on here, since 2026-11-22T06:00") as error:
            directory.lock().__enter__()
        assert error.value.exit_code == ExitCode.LOCKED
        assert directory.locked()
        process.send_signal(signal.SIGKILL)
    assert not directory.locked()
    with directory.lock():
        assert directory.locked()
    assert not directory.locked()


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match="no"), directory.lock():
        raise ValueError("no")
    assert not directory.locked()


def test_the_lock_leaves_no_file(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).lock():
        assert list(tmp_path.iterdir()) == []


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="No such file"), RunDirectory(tmp_path / "gone").lock():
        pytest.fail("locked nothing")


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"job"', b"\xff"])
def test_an_unreadable_summary_counts_as_absent(tmp_path: Path, content: bytes | None) -> None:
    directory = RunDirectory(tmp_path)
    if content is not None:
        directory.summary.write_bytes(content)
    assert directory.read_summary() is None


def test_the_reserve_is_given_back_once(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.reserve_room()
    assert directory.reserve.stat().st_blocks * 512 >= 16_000_000
    assert directory.free_room()
    assert not directory.free_room()
    assert not directory.reserve.exists()
