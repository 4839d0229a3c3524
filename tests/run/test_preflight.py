"""`check` and `estimate` refuse what `run` refuses: the same exit code and the same line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from batchrun.errors import ExitCode
from tests.cli_process import KEY_ENV, Ended, batchrun, write_job, write_rows
from tests.crash.strace import MISSING


def no_place(folder: Path) -> None:
    (folder / "file").write_text("")


def bad_record(folder: Path) -> None:
    with (folder / "in.jsonl").open("a") as lines:
        lines.write('{"id": 9}\n')


def own_column(folder: Path) -> None:
    (folder / "in.jsonl").write_text('{"text": "a", "status": "new"}\n')


def nothing(folder: Path) -> None:
    pass


BAD: dict[str, tuple[list[str], str, Callable[[Path], None]]] = {
    "a name in output.path": (["output.path=runs/{jobname}"], "output.path: {jobname} is unknown", nothing),
    "faults": (["endpoint.url=simulator", 'simulator.faults="nonsense"'], "simulator.faults: ", nothing),
    "faults of no kind": (["endpoint.url=simulator", "simulator.faults=999x=0.1"], "simulator.faults: ", nothing),
    "no key": (["endpoint.api_key_env=NOT_SET_ANYWHERE"], "endpoint.api_key_env: ", nothing),
    "no key file": (["endpoint.api_key_file=nowhere"], "endpoint.api_key_file: ", nothing),
    "no certificates": (["endpoint.ca_file=nowhere.pem"], "endpoint.ca_file: can't load nowhere.pem", nothing),
    "a file in the way": (["output.path=file"], "file: a file is in the way", no_place),
    "a file on the way": (["output.path=file/out"], "file/out: a file is in the way", no_place),
    "an unknown price under a cap": (["budget.max_cost_usd=1", "request.model=no-such-model"], "the price of", nothing),
    "a cap below one request": (["budget.max_cost_usd=0.0000001"], "is less than the largest request", nothing),
    "a cap on tokens below one": (["budget.max_tokens=1"], "are fewer than the largest request", nothing),
    "too few rows": (["input.min_rows=100"], "input.min_rows expects 100 or more", nothing),
    "a bad record": ([], "1 of 4 input records make no valid request", bad_record),
    "a column of ours": ([], "has the name of an output column", own_column),
    "no such column": (['output.columns=["nope"]'], "output.columns: 'nope' is not an input column", nothing),
    "no input": (["input.path=nowhere.jsonl"], "nowhere.jsonl", nothing),
    "an input's name that is too long": (
        ["input.path=" + "x" * 300],
        "x: File name too long; choose another name",
        nothing,
    ),
    "a name that is too long": (["output.path=" + "x" * 300], "File name too long; choose another name", nothing),
    "a bad template": (['request.prompt="{{ text"'], "request.prompt: ", nothing),
    "a wrong setting": (["limits.max_in_flihgt=3"], "limits.max_in_flihgt: unknown setting", nothing),
}


def said(ended: Ended) -> tuple[int, str]:
    """The exit code and the last line, which is the error's."""
    return ended.exit_code, ended.stderr.splitlines()[-1]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("fault", BAD)
def test_check_and_estimate_refuse_like_run(tmp_path: Path, fault: str) -> None:
    settings, words, prepare = BAD[fault]
    write_rows(tmp_path / "in.jsonl", 3)
    prepare(tmp_path)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", "in.jsonl")
    if "key_file" in words:
        job.write_text(job.read_text().replace(f'api_key_env = "{KEY_ENV}"\n', ""))
    over = [word for setting in ["output.path=out", *settings] for word in ("--set", setting)]
    before = sorted(tmp_path.iterdir())
    check, estimate = (said(batchrun(command, "job.toml", *over, cwd=tmp_path)) for command in ("check", "estimate"))
    assert sorted(tmp_path.iterdir()) == before, "neither writes anything"
    run = said(batchrun("run", "job.toml", *over, cwd=tmp_path))
    assert run[0] == ExitCode.USAGE
    assert words in run[1]
    assert check == run
    assert estimate == run


def test_check_and_estimate_skip_like_run(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 3)
    bad_record(tmp_path)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", tmp_path / "in.jsonl")
    check, estimate = (batchrun(command, job, "--skip-invalid", cwd=tmp_path) for command in ("check", "estimate"))
    assert check.exit_code == estimate.exit_code == ExitCode.COMPLETE
    assert "3 rows in 1 file, 1 set aside, read as columns" in check.stdout
    assert "to send      3 rows" in estimate.stdout


def test_findings_come_before_a_missing_key(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 3)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", tmp_path / "in.jsonl")
    missing = ("--set", "endpoint.api_key_env=NOT_SET_ANYWHERE")
    assert "NOT_SET_ANYWHERE" not in os.environ
    for command, finding in (("check", "3 rows in 1 file"), ("estimate", "to send      3 rows")):
        ended = batchrun(command, job, *missing, cwd=tmp_path)
        assert ended.exit_code == ExitCode.USAGE
        assert finding in ended.stdout
        assert "NOT_SET_ANYWHERE" in ended.stderr


PARTITIONED = ("--set", 'output.partition_by=["id"]')


def test_check_and_run_find_unwritable_datasets(tmp_path: Path) -> None:
    """Before a record is read: its result would be paid for when the dataset is found to be out of reach."""
    write_rows(tmp_path / "in.jsonl", 3)
    write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", "in.jsonl")
    away = ("--set", "output.path=out", *PARTITIONED, "--set", "output.dataset=/proc/labels")  # for root, too
    for command in ("check", "run"):
        code, line = said(batchrun(command, "job.toml", *away, cwd=tmp_path))
        assert code == ExitCode.USAGE
        assert line.startswith("Error: output.dataset: /proc/labels can't be written: ")
    there = ("--set", "output.path=out", *PARTITIONED, "--set", "output.dataset=labels")
    before = sorted(tmp_path.rglob("*"))
    assert batchrun("check", "job.toml", *there, cwd=tmp_path).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before, "what was tried is gone again"


@pytest.mark.heavy
def test_check_finds_a_full_disk(tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", 3)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", tmp_path / "in.jsonl")
    strace = shutil.which("strace")
    assert strace is not None, MISSING
    log = ["-o", str(tmp_path / "strace.log"), "-e", "signal=none", "-e", "trace=fsync"]
    for when, place in (("1+", str(tmp_path / "out")), ("2+", "output.dataset: ")):
        full = [strace, "-f", "-qqq", *log, "-e", f"inject=fsync:error=ENOSPC:when={when}"]
        over = ("--set", f"output.path={tmp_path / 'out'}", *PARTITIONED, "--set", f"output.dataset={tmp_path / 'd'}")
        code, line = said(batchrun("check", job, *over, before=full))
        assert (code, "No space left on device; make room and run the same command again" in line) == (5, True), line
        assert place in line
