"""`output.dataset`: a hive directory that many runs share."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import SimulatorConfig
from tests import prefork
from tests.cli_process import batchrun, write_job
from tests.run.test_partitioned import write_input
from tests.simulator_process import RunningSimulator, running_simulator

MORE = """[output]
partition_by = ["lang"]
dataset = "{dataset}"
max_failures = 100
"""


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.005)) as running:
        yield running


def files_of(dataset: Path) -> dict[str, tuple[int, int]]:
    """The files that readers see → inode and rows."""
    return {
        str(path.relative_to(dataset)): (path.stat().st_ino, pq.read_metadata(path).num_rows)
        for path in sorted(dataset.rglob("*.parquet"))
    }


def test_a_run_replaces_exactly_its_partitions(tmp_path: Path, simulator: RunningSimulator) -> None:
    dataset, job = tmp_path / "warehouse" / "labels", tmp_path / "job.toml"
    write_job(job, simulator.url, tmp_path / "in.jsonl", MORE.format(dataset=dataset))
    write_input(tmp_path / "in.jsonl", 30, ("de", "en", None))
    ended = batchrun("run", job, "-o", tmp_path / "first")
    assert ended.exit_code == 0, ended.stderr
    before = files_of(dataset)
    null = "lang=__HIVE_DEFAULT_PARTITION__"
    assert {name.partition("/")[0]: rows for name, (_, rows) in before.items()} == {
        "lang=de": 10,
        "lang=en": 10,
        null: 10,
    }
    (dataset / "lang=en" / "data_0.parquet").write_bytes(
        (dataset / "lang=en" / "part-000000.parquet").read_bytes()
    )  # as another program would have left it
    write_input(tmp_path / "in.jsonl", 8, ("en", "fr"))
    ended = batchrun("run", job, "-o", tmp_path / "second")
    assert ended.exit_code == 0, ended.stderr
    after = files_of(dataset)
    assert {name.partition("/")[0]: rows for name, (_, rows) in after.items()} == {
        **{"lang=de": 10, null: 10},
        **{"lang=en": 4, "lang=fr": 4},
    }
    for kept in ("lang=de/part-000000.parquet", f"{null}/part-000000.parquet"):
        assert after[kept] == before[kept]
    assert [path.name for path in dataset.parent.iterdir()] == ["labels"]
    for run in ("first", "second"):  # each run still has its own result
        assert batchrun("run", job, "-o", tmp_path / run, "-i", tmp_path / "in.jsonl").exit_code in (0, 2)
        assert "nothing is damaged" in batchrun("verify", tmp_path / run).stdout
    assert ds.dataset(dataset, partitioning=ds.partitioning(flavor="hive")).count_rows() == 28


def test_a_dataset_that_does_not_fit_is_refused(tmp_path: Path, simulator: RunningSimulator) -> None:
    write_input(tmp_path / "in.jsonl", 4)
    job = write_job(
        tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl", MORE.format(dataset=tmp_path / "labels")
    )
    served = len(simulator.ledger())
    day = tmp_path / "labels" / "day=1"
    below = tmp_path / "below" / "lang=de" / "day=1"
    for folder in (day, below, tmp_path / "flat"):
        folder.mkdir(parents=True)
    (tmp_path / "flat" / "a.parquet").write_bytes(b"")
    cases = {
        "labels": f"{day} is not a folder named lang=…; the dataset has other keys than lang",
        "below": f"{below} is a folder below those of lang",
        "flat": "a.parquet is not a folder named lang=…",
        "job.toml": "is a file; name a directory",
        ".": "holds the run's input; name another directory",
    }
    for name, line in cases.items():
        ends = [
            batchrun(command, job, "--set", f"output.dataset={tmp_path / name}", *arguments)
            for command, arguments in (("check", ()), ("estimate", ()), ("run", ("-o", tmp_path / "out")))
        ]
        assert [ended.exit_code for ended in ends] == [2, 2, 2], name
        assert {line in ended.stderr for ended in ends} == {True}, (name, ends[0].stderr)
    ended = batchrun("check", job, "--set", "output.partition_by=[]")
    assert "output.dataset: takes partitions; name the columns in output.partition_by" in ended.stderr
    assert len(simulator.ledger()) == served


PUBLISH_FOR_EVER = """
import sys
from pathlib import Path
from batchrun.records import FinishedResult, ResultFile
from batchrun.store.rundir import RunDirectory
from batchrun.store.shared_dataset import publish
root = Path(sys.argv[1])
runs = []
for version in ("a", "b"):
    names = [f"completions/k={n}/part-000000.parquet" for n in range(8)]
    for name in names:
        (root / version / name).parent.mkdir(parents=True, exist_ok=True)
        (root / version / name).write_text(version * 1000)
    files = tuple(ResultFile(name, 1, 1000, 0, "") for name in names)
    runs.append((FinishedResult(files, (), "completions"), RunDirectory(root / version), version))
while True:
    for written, directory, version in runs:
        publish(written, directory, str(root / "dataset"), version)
        print(version, flush=True)
"""


def test_a_killed_publish_leaves_whole_partitions(tmp_path: Path) -> None:
    """A reader meets every partition, whole, at every moment; after the kill the next publish is complete."""
    for number in range(4):
        with prefork.script(PUBLISH_FOR_EVER, tmp_path) as process:
            assert process.stdout is not None
            for wanted in ("a\n", "b\n"):
                assert process.stdout.readline() == wanted
            ends_at = time.monotonic() + 0.05 + 0.013 * number
            while time.monotonic() < ends_at:
                for place in range(8):
                    assert len((tmp_path / "dataset" / f"k={place}" / "part-000000.parquet").read_text()) == 1000
            process.send_signal(signal.SIGKILL)
        for place in range(8):
            folder = tmp_path / "dataset" / f"k={place}"
            assert os.listdir(folder) == ["part-000000.parquet"]  # noqa: PTH208
            assert set((folder / "part-000000.parquet").read_text()) in ({"a"}, {"b"})


@pytest.mark.heavy
def test_shards_are_merged_in_every_layout(tmp_path: Path, simulator: RunningSimulator) -> None:
    """Not the shards but the merge publishes their partitions: a shard has some of their rows only."""
    write_input(tmp_path / "in.jsonl", 21, ("de", "en", None))
    dataset = tmp_path / "labels"
    job = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.jsonl", MORE.format(dataset=dataset))
    lines = ("--set", "output.partition_by=[]", "--set", "output.format=jsonl")
    for name, flags in (("parted", ()), ("lines", (*lines, "--set", "output.chunk_rows=4"))):
        if flags:
            job.write_text(job.read_text("utf-8").replace(f'dataset = "{dataset}"', ""), "utf-8")
        for number in (0, 1):
            ended = batchrun("run", job, "-o", tmp_path / name, "--shard", f"{number}/2", *flags)
            assert ended.exit_code == 0, ended.stderr
            assert dataset.exists() == (name == "lines")
        for _ in range(2):
            ended = batchrun("merge", *sorted(tmp_path.glob(f"{name}.shard-*")), "-o", tmp_path / name)
            assert ended.exit_code == 0, ended.stderr
        assert "nothing is damaged" in batchrun("verify", tmp_path / name).stdout
        assert "21 rows" in batchrun("export", tmp_path / name, "-o", tmp_path / f"{name}.parquet").stdout
        assert pq.read_table(tmp_path / f"{name}.parquet").column("row").to_pylist() == list(range(21))
    assert sum(rows for _, rows in files_of(dataset).values()) == 21
    assert len((tmp_path / "lines" / "completions.jsonl").read_text("utf-8").splitlines()) == 21
