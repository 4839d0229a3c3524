"""What a publish does when the store fails: it repeats what may pass, ends with one line, and never looks finished."""

import gc
import json
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import cast

import pytest

from batchrun.errors import BatchrunError, ExitCode, RunLockedError, StorageError
from batchrun.simulator import SimulatorConfig
from batchrun.storage import publish as publishing
from batchrun.storage.access import connect
from batchrun.storage.claim import Claim, this_process
from batchrun.storage.folder import folder_at
from batchrun.storage.publish import Publication, Published, RunRecord
from batchrun.storage.urls import parse
from tests.cli_process import batchrun as command
from tests.cli_process import finish, kill_when, start
from tests.run.test_publish import Machine, sent
from tests.s3_server import BUCKET, READER, S3Server, environ_for, environment, fails, proxy_before
from tests.simulator_process import RunningSimulator, running_simulator

pytestmark = pytest.mark.sampled(0)  # a server of its own: in `make test-rest`


@pytest.fixture(scope="module")
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.001)) as simulator:
        yield simulator


@pytest.mark.parametrize("fault", ["500", "503", "cut", "slow"])
def test_a_fault_that_passes_is_repeated(s3: S3Server, api: RunningSimulator, tmp_path: Path, fault: str) -> None:
    with proxy_before(s3, fails("completions.parquet", fault, times=1)) as proxy, environment(environ_for(proxy.url)):
        assert Machine(tmp_path, api, f"passes/{fault}").run().complete
    assert "summary.json" in s3.names(f"{BUCKET}/passes/{fault}")


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("PUT .*completions.parquet|POST .*completions.parquet", "500"),
        ("(PUT|POST) .*/usage.parquet", "503"),
        ("(PUT|POST) .*/summary.json", "500"),
        ("(PUT|POST) .*/summary.json", "412"),
        ("(PUT|POST) .*completions.parquet", "cut"),
    ],
)
def test_a_store_failing_for_long_loses_nothing(
    s3: S3Server, api: RunningSimulator, tmp_path: Path, pattern: str, fault: str
) -> None:
    """It ends the start; the next one publishes."""
    place = f"fails/{abs(hash((pattern, fault)))}"
    machine = Machine(tmp_path, api, place)
    with proxy_before(s3, fails(pattern, fault)) as proxy, environment(environ_for(proxy.url)):
        shown = command("run", machine.job, "--state-dir", machine.state)
    assert shown.exit_code == ExitCode.PAUSED, shown.stderr
    line = shown.stderr.splitlines()[-1]
    assert "publishing it sends no request" in line
    assert "Traceback" not in shown.stderr
    assert "summary.json" not in s3.names(f"{BUCKET}/{place}")
    before = sent(api)
    shown = command("run", machine.job, "--state-dir", machine.state)
    assert (shown.exit_code, sent(api)) == (0, before), shown.stderr
    assert "summary.json" in s3.names(f"{BUCKET}/{place}")


def test_a_denying_or_absent_store_is_named(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    machine = Machine(tmp_path, api, "late")
    with (
        proxy_before(s3, fails("(PUT|POST) /data/late/completions", "403")) as proxy,
        environment(environ_for(proxy.url)),
        pytest.raises(StorageError, match="denied"),
    ):
        machine.run()
    before = sent(api)
    assert machine.run().complete
    assert sent(api) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_the_result_is_published(
    s3: S3Server, api: RunningSimulator, tmp_path: Path, number: signal.Signals
) -> None:
    place = f"signal-{number}"
    machine = Machine(tmp_path, api, place)
    with proxy_before(s3, fails(f"{place}/completions", "slow")) as proxy, environment(environ_for(proxy.url)):
        process = start("run", machine.job, "--state-dir", machine.state)
        kill_when(process, lambda: proxy.count(f"(PUT|POST) .*{place}/completions") > 0, number)
        ended = finish(process)
    assert ended.exit_code in ({-9} if number is signal.SIGKILL else {128 + number}), ended
    assert "Traceback" not in ended.stderr
    assert "summary.json" not in s3.names(f"{BUCKET}/{place}")
    before = sent(api)
    shown = command("run", machine.job, "--state-dir", machine.state)
    assert (shown.exit_code, sent(api)) == (0, before), shown.stderr
    assert "summary.json" in s3.names(f"{BUCKET}/{place}")


LAYOUTS = {
    "parts": ('layout = "parts"\nchunk_rows = 8\n', "completions/part-00000[1-3]"),
    "partitions": ('partition_by = ["id"]\n', "completions/id(=|%3D)1"),
    "lines": ('format = "jsonl.gz"\n', "completions.jsonl.gz"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("method", "fault"), [("(PUT|POST)", "500"), ("PUT", "403"), ("PUT", "503"), ("HEAD", "500"), ("kill", "slow")]
)
def test_every_layout_is_published_whole_or_unfinished(
    s3: S3Server, api: RunningSimulator, tmp_path: Path, layout: str, method: str, fault: str
) -> None:
    """Whatever of a result is in its place is one of its files, whole; the next start publishes the rest."""
    settings, pattern = LAYOUTS[layout]
    place = f"{layout}/{method.strip('()').replace('|', '')}-{fault}"
    machine = Machine(tmp_path, api, place, output=settings, rows=30 if layout == "parts" else 5)
    script = fails(f"^{'PUT' if method == 'kill' else method} .*{pattern}", fault)
    with proxy_before(s3, script) as proxy, environment(environ_for(proxy.url)):
        process = start("run", machine.job, "--state-dir", machine.state)
        if method == "kill":
            kill_when(process, lambda: proxy.count(f"PUT .*{place}/{pattern}") > 0, signal.SIGKILL)
        ended = finish(process)
    assert ended.exit_code in ({-9} if method == "kill" else {ExitCode.PAUSED}), ended
    assert "Traceback" not in ended.stderr

    def published() -> list[str]:
        names = [name for name in s3.names(f"{BUCKET}/{place}") if not name.startswith("_batchrun/")]
        for name in names:
            if name != "summary.json":  # its paths are those of the store
                assert s3.read(f"{BUCKET}/{place}/{name}") == (machine.directory / name).read_bytes(), name
        return names

    assert "summary.json" not in published()
    before = sent(api)
    shown = command("run", machine.job, "--state-dir", machine.state)
    assert (shown.exit_code, sent(api)) == (0, before), shown.stderr
    names = published()
    assert {"summary.json", "usage.parquet"} < set(names)
    files = [path for path in machine.directory.rglob("completions*/**/*") if path.is_file()]
    assert len(names) - 2 == (len(files) or 1)
    left = [name for name in s3.names(f"{BUCKET}/{place}") if name.startswith("_batchrun/") and "claims" not in name]
    assert left == ["_batchrun/run.json"]


def test_the_next_publish_deletes_staged_files(s3: S3Server, tmp_path: Path) -> None:
    """Also if it is that of another run: the first one may never be resumed."""
    s3.put(f"{BUCKET}/staged/_batchrun/staged/r0/completions/part-0.parquet.x0.part", b"of a run that was cut")
    folder = folder_at(f"s3://{BUCKET}/staged")
    with Claim(folder, this_process("w", "j")) as claim:
        publishing.publish(claim, Publication(parts(tmp_path / "a", 2), [], SUMMARY, record()))
    left = [name for name in s3.names(f"{BUCKET}/staged") if name.startswith("_batchrun/")]
    assert left == ["_batchrun/run.json"]


def test_an_upload_that_is_left_brings_nothing(s3: S3Server, tmp_path: Path) -> None:
    """By a signal or a local error in the middle. Arrow would complete it when it destroys the stream."""
    folder, local = folder_at(f"s3://{BUCKET}/left"), tmp_path / "big"
    local.write_bytes(bytes(40_000_000))
    s3.put(f"{BUCKET}/left/big", b"the old one")

    def interrupt(method: str, path: str) -> str | None:
        if "partNumber=2" in path:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    with (
        proxy_before(s3, interrupt) as proxy,
        environment(environ_for(proxy.url)),
        pytest.raises(KeyboardInterrupt),
    ):
        folder_at(f"s3://{BUCKET}/left").put_file("big", local)
    gc.collect()
    assert folder.read("big") == b"the old one"


def test_an_absent_store_is_given_up_soon() -> None:
    """Google's client would try for a quarter of an hour."""
    with environment({"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}):
        filesystem, _ = connect(parse("gs://bucket/x"))
    _, arguments = cast("tuple[object, tuple[dict[str, object]]]", filesystem.__reduce__())
    assert arguments[0]["retry_time_limit"] == timedelta(seconds=15)


# ── a publish step by step ────────────────────────────────────────────────────────────────────────────────────────────

SUMMARY = json.dumps({"run_id": "r1", "complete": True, "job": "j"}).encode()


def record(run_id: str = "r1") -> RunRecord:
    return RunRecord(run_id, "j", "f", ("d",), 3)


def parts(folder: Path, count: int, content: str = "x") -> list[Published]:
    folder.mkdir(exist_ok=True)
    made = []
    for n in range(count):
        local = folder / f"part-{n}.parquet"
        local.write_text(content * (n + 1))
        made.append(Published(f"completions/part-{n}.parquet", local, f"{content}{n}"))
    return made


class _CutError(Exception):
    pass


def test_a_publish_cut_anywhere_looks_unfinished(s3: S3Server, tmp_path: Path) -> None:
    usage = tmp_path / "usage.parquet"
    usage.write_text("usage")
    beside = [Published("usage.parquet", usage, "u")]
    folder = folder_at(f"s3://{BUCKET}/cut")

    def published(files: list[Published], summary: bytes, cut_at: int = 1000) -> int:
        steps = 0

        def reached(step: str) -> None:
            nonlocal steps
            steps += 1
            if steps == cut_at:
                raise _CutError

        with Claim(folder, this_process("w", "j")) as claim:
            publishing.publish(claim, Publication(files, beside, summary, record()), reached=reached)
        return steps

    steps = published(parts(tmp_path / "a", 3), SUMMARY)
    assert steps == 9
    newer = SUMMARY.replace(b'"j"', b'"jj"')
    for cut_at in range(1, steps - 1):  # one part less
        for name in s3.names(f"{BUCKET}/cut/_batchrun/staged"):
            s3.filesystem.delete_file(f"{BUCKET}/cut/_batchrun/staged/{name}")
        with pytest.raises(_CutError):
            published(parts(tmp_path / "b", 2, "y"), newer, cut_at)
        assert publishing.published_run(folder) is None
        seen = [name for name in s3.names(f"{BUCKET}/cut") if name.endswith(".parquet")]
        assert all(not name.startswith("_") for name in seen), "a pattern finds no file that is only staged"
    published(parts(tmp_path / "b", 2, "y"), newer)
    names = ["_batchrun/run.json", "completions/part-0.parquet", "completions/part-1.parquet"]
    assert s3.names(f"{BUCKET}/cut") == [*names, "summary.json", "usage.parquet"]
    assert s3.read(f"{BUCKET}/cut/completions/part-1.parquet") == b"yy"


def test_of_two_writers_at_most_one_works(s3: S3Server) -> None:
    folder = folder_at(f"s3://{BUCKET}/two")
    waits: list[float] = []
    never = waits.append
    with Claim(folder, this_process("one", "j"), sleep=never) as first:
        with pytest.raises(RunLockedError, match=r"another run works there \(pid"):
            Claim(folder, this_process("two", "j"), sleep=never).__enter__()
        first.require_held()
        with Claim(folder, this_process("two", "j"), sleep=never, stale_s=-1) as second:  # the first is silent for long
            second.require_held()
            with pytest.raises(RunLockedError, match="has taken over"):
                first.require_held()
            with pytest.raises(RunLockedError):
                publishing.publish(first, Publication([], [], SUMMARY, record()))
    assert s3.names(f"{BUCKET}/two") == []


def test_another_runs_result_is_not_replaced(s3: S3Server) -> None:
    folder = folder_at(f"s3://{BUCKET}/taken")
    s3.put(f"{BUCKET}/taken/summary.json", SUMMARY)
    with Claim(folder, this_process("w", "j")) as claim, pytest.raises(BatchrunError, match="of another run"):
        publishing.publish(claim, Publication([], [], SUMMARY.replace(b"r1", b"r2"), record("r2")))
    assert s3.read(f"{BUCKET}/taken/summary.json") == SUMMARY


def test_a_reader_alone_can_not_publish(s3: S3Server) -> None:
    with (
        environment(environ_for(s3.url, READER)),
        pytest.raises(StorageError, match="access is denied"),
        Claim(folder_at(f"s3://{BUCKET}/reader"), this_process("w", "j")),
    ):
        pass
