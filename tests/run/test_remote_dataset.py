"""`output.dataset` at a URL: a hive dataset in an object store that many runs share, against a real S3 server."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest

from batchrun.errors import ExitCode
from batchrun.simulator import SimulatorConfig
from tests.cli_process import Ended, batchrun, finish, kill_when, start, write_job
from tests.run.test_partitioned import write_input
from tests.s3_server import BUCKET, READER, S3Server, environ_for, environment, fails, proxy_before
from tests.simulator_process import RunningSimulator, running_simulator

pytestmark = pytest.mark.heavy

VALUES: tuple[Any, ...] = ("de", "pt BR", "a/b=c%", "é+?#&;", None)


@pytest.fixture(scope="module")
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.001)) as simulator:
        yield simulator


class Shared:
    """Runs of one job that write to one dataset."""

    def __init__(self, disk: Path, api: RunningSimulator, name: str) -> None:
        self.disk = disk
        self.url = f"s3://{BUCKET}/{name}"
        more = f'[output]\npartition_by = ["lang"]\ndataset = "{self.url}"\nmax_failures = 100\n'
        self.job = write_job(disk / "job.toml", api.url, disk / "in.jsonl", more)

    def run(self, name: str, *more: str) -> Ended:
        return batchrun("run", self.job, "-o", self.disk / name, *more)


def files_of(s3: S3Server, shared: Shared) -> dict[str, tuple[int, int]]:
    """What readers of the dataset see → rows and the time of its last change."""
    folder = shared.url.removeprefix("s3://")
    read = ds.dataset(folder, filesystem=s3.filesystem, format="parquet")
    found: dict[str, tuple[int, int]] = {}
    for fragment in read.get_fragments():
        changed_ns = s3.filesystem.get_file_info(fragment.path).mtime_ns
        found[fragment.path.removeprefix(f"{folder}/")] = fragment.count_rows(), changed_ns or 0
    return found


def sent(api: RunningSimulator) -> int:
    return len(api.ledger())


def test_a_run_replaces_exactly_its_partitions(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    shared = Shared(tmp_path, api, "labels")
    write_input(tmp_path / "in.jsonl", 20, VALUES)
    ended = shared.run("first")
    assert ended.exit_code == 0, ended.stderr
    before = files_of(s3, shared)
    assert {rows for rows, _ in before.values()} == {4}
    assert "lang=%C3%A9%2B%3F%23%26%3B/part-000000.parquet" in before
    hive = ds.partitioning(flavor="hive")
    read = ds.dataset(f"{BUCKET}/labels", filesystem=s3.filesystem, partitioning=hive).to_table()
    assert set(read.column("lang").to_pylist()) == set(VALUES)

    write_input(tmp_path / "in.jsonl", 6, ("pt BR", "fr"))
    assert shared.run("second").exit_code == 0
    after = files_of(s3, shared)
    assert {name: rows for name, (rows, _) in after.items() if rows != 4} == {
        "lang=pt%20BR/part-000000.parquet": 3,
        "lang=fr/part-000000.parquet": 3,
    }
    changed = {name for name, seen in after.items() if seen != before.get(name)}
    assert changed == {"lang=pt%20BR/part-000000.parquet", "lang=fr/part-000000.parquet"}
    assert s3.names(f"{BUCKET}/labels") == sorted(after), "nothing else is left there"
    assert "nothing is damaged" in batchrun("verify", tmp_path / "second").stdout


def test_partitions_not_replaceable_at_once_are_refused(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """Before anything is sent."""
    write_input(tmp_path / "in.jsonl", 4)
    before = sent(api)
    cases = {
        "several": ("lang=de/data_0.parquet", "is not the one file part-000000.parquet of its partition"),
        "deeper": ("lang=de/day=1/part-000000.parquet", "is in no folder named lang=…; the dataset has other"),
        "other": ("day=1/part-000000.parquet", "is in no folder named lang=…"),
        "flat": ("part-000000.parquet", "is in no folder named lang=…"),
    }
    for name, (there, line) in cases.items():
        s3.put(f"{BUCKET}/{name}/{there}", b"x")
        shared = Shared(tmp_path, api, name)
        commands: list[tuple[str | Path, ...]] = [("check", shared.job), ("estimate", shared.job)]
        for ended in [*(batchrun(*each) for each in commands), shared.run("out")]:
            assert (ended.exit_code, line in ended.stderr) == (2, True), (name, ended.stderr)
            assert f"s3://{BUCKET}/{name}/{there}" in ended.stderr
    s3.put(f"{BUCKET}/inside/in.jsonl", (tmp_path / "in.jsonl").read_bytes())
    ended = batchrun("check", Shared(tmp_path, api, "inside").job, "-i", f"s3://{BUCKET}/inside/in.jsonl")
    assert (ended.exit_code, "holds the run's input" in ended.stderr) == (2, True), ended.stderr
    ended = batchrun("check", shared.job, "--set", "output.dataset=abfss://c@a.dfs.core.windows.net/x")
    assert (ended.exit_code, "can't be replaced in one step" in ended.stderr) == (2, True), ended.stderr
    for name in ("_SUCCESS", "_batchrun/x", ".hidden/y", "lang=de/_metadata"):
        s3.put(f"{BUCKET}/marked/{name}", b"")
    s3.filesystem.create_dir(f"{BUCKET}/marked/lang=fr")  # a marker of a folder, as consoles make them
    assert batchrun("check", Shared(tmp_path, api, "marked").job).exit_code == 0
    assert sent(api) == before


def test_a_failed_publish_leaves_whole_partitions(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """The next start repeats it."""
    shared = Shared(tmp_path, api, "faults")
    write_input(tmp_path / "in.jsonl", 12, ("de", "en", "fr"))
    assert shared.run("first").exit_code == 0
    before = files_of(s3, shared)
    write_input(tmp_path / "in.jsonl", 6, ("de", "en", "fr"))
    for number, fault in enumerate(("500", "403", "cut")):
        name = f"second-{fault}"
        with (
            proxy_before(s3, fails("(PUT|POST) .*lang(=|%3D)en/part", fault)) as proxy,
            environment(environ_for(proxy.url)),
        ):
            ended = shared.run(name)
        assert ended.exit_code == ExitCode.PAUSED, ended.stderr
        line = ended.stderr.splitlines()[-1]
        assert "lang=en/part-000000.parquet can't be written" in line, line
        seen = {name.partition("/")[0]: rows for name, (rows, _) in files_of(s3, shared).items()}
        wanted = {"lang=de": 2, "lang=en": 4, "lang=fr": 4} if fault != "cut" else seen
        assert seen == wanted, fault
        already = sent(api)
        if number == 2:
            ended = shared.run(name)
            assert (ended.exit_code, sent(api)) == (0, already), ended.stderr
    after = files_of(s3, shared)
    assert {rows for rows, _ in after.values()} == {2}
    assert all(after[name] != before[name] for name in before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_publish_cut_mid_file_keeps_the_old(
    s3: S3Server, api: RunningSimulator, tmp_path: Path, number: signal.Signals
) -> None:
    """A file of several parts: what an upload has sent so far is no object."""
    shared = Shared(tmp_path, api, f"middle-{number}")
    s3.put(f"{shared.url.removeprefix('s3://')}/lang=de/part-000000.parquet", b"old")
    big = "".join(chr(97 + n * 7919 % 26) for n in range(4000))
    lines = [f'{{"id": {n}, "text": "x", "lang": "de", "more": "{n}{big[n:]}{n * 7}"}}\n' for n in range(8)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    slow = fails("POST .*part-000000.parquet.*uploadId|PUT .*part-000000.parquet", "slow")
    with proxy_before(s3, slow) as proxy, environment(environ_for(proxy.url)):
        process = start("run", shared.job, "-o", tmp_path / "out")
        kill_when(process, lambda: proxy.count("(PUT|POST) .*lang.*part-000000") > 0, number)
        ended = finish(process)
    assert ended.exit_code in ({-9} if number is signal.SIGKILL else {128 + number}), ended
    assert "Traceback" not in ended.stderr
    already = sent(api)
    ended = shared.run("out")
    assert (ended.exit_code, sent(api)) == (0, already), ended.stderr
    assert [rows for rows, _ in files_of(s3, shared).values()] == [8]


def test_the_dataset_is_tried_before_anything_is_sent(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    write_input(tmp_path / "in.jsonl", 4)
    before = sent(api)
    shared = Shared(tmp_path, api, "denied")
    with environment(environ_for(s3.url, READER)):
        for ended in (batchrun("check", shared.job), shared.run("out")):
            assert (ended.exit_code, "access is denied" in ended.stderr) == (5, True), ended.stderr
    shared = Shared(tmp_path, api, "x")
    ended = batchrun("check", shared.job, "--set", "output.dataset=s3://no-such-bucket/x")
    assert (ended.exit_code, "there is no such bucket" in ended.stderr) == (5, True), ended.stderr
    assert sent(api) == before


def test_shards_are_merged_into_it(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    shared = Shared(tmp_path, api, "merged")
    write_input(tmp_path / "in.jsonl", 10, ("de", "en"))
    for number in (0, 1):
        assert shared.run("out", "--shard", f"{number}/2").exit_code == 0
        assert s3.names(f"{BUCKET}/merged") == []
    for _ in range(2):
        ended = batchrun("merge", *sorted(tmp_path.glob("out.shard-*")), "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
    assert [rows for rows, _ in files_of(s3, shared).values()] == [5, 5]
