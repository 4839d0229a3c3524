"""Kills while a result is published, in every layout: readers see the old result whole or the new one, and no request
is repeated.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun, write_job, write_rows
from tests.crash.dying import dies
from tests.level import amount, seeded
from tests.simulator_process import RunningSimulator, running_simulator

ROWS, FEWER = 40, 24
MORE = "[output]\nchunk_rows = 8\nmax_failures = 100\n"
LAYOUTS = {
    "file": "",
    "parts": 'layout = "parts"',
    "partitions": 'partition_by = ["status"]\ndataset = "{folder}/dataset"',
    "jsonl": 'format = "jsonl.zst"',
}

_FOLDER, _MANIFEST = "batchrun.durable:replace_folder", "batchrun.store.checkpoint:Checkpoint.write_manifest"
_RECORDED = [(_MANIFEST, "before", "finished"), (_MANIFEST, "after", "finished")]
KILLS: dict[str, list[tuple[str, str, str]]] = {
    "file": [
        *_RECORDED,
        ("os:rename", "before", "completions.parquet'"),
        ("os:rename", "after", "completions.parquet'"),
    ],
    "parts": [
        *((_FOLDER, side, "completions") for side in ("before", "after")),
        *_RECORDED,
        ("os:rename", "after", "completions.tmp/part-000002"),
    ],
    "partitions": [
        *((_FOLDER, side, "completions") for side in ("before", "after")),
        *((_FOLDER, side, "dataset/") for side in ("after", "before")),
        *_RECORDED,
    ],
    "jsonl": [*_RECORDED, ("os:rename", "before", "completions.jsonl"), ("os:rename", "after", "completions.jsonl")],
}


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.005)) as running:
        yield running


def rows_that_readers_see(out: Path, layout: str) -> int:
    if layout == "file":
        return pq.read_metadata(out / "completions.parquet").num_rows
    if layout == "jsonl":
        return pa.input_stream(out / "completions.jsonl.zst").read().count(b"\n")
    folder = out / "completions"
    listed = json.loads((folder / "_manifest.json").read_bytes())
    sizes = {file["name"]: (file["rows"], file["bytes"]) for file in listed["files"]}
    assert sizes == {
        path.relative_to(folder).as_posix(): (pq.read_metadata(path).num_rows, path.stat().st_size)
        for path in folder.rglob("*.parquet")
    }
    return sum(rows for rows, _ in sizes.values())


@pytest.mark.heavy
@pytest.mark.campaign
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_publication_shows_one_whole_result(tmp_path: Path, simulator: RunningSimulator, layout: str) -> None:
    """The run has a result of fewer rows, which the new one replaces."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    settings = MORE + LAYOUTS[layout].format(folder=tmp_path)
    kills = seeded(layout).sample(KILLS[layout], min(amount(1, 99), len(KILLS[layout])))
    for number, kill in enumerate(kills):
        job, out = write_job(tmp_path / "job.toml", simulator.url, source, settings), tmp_path / f"out{number}"
        assert batchrun("run", job, "-o", out, "--limit", str(FEWER)).exit_code == 0
        assert rows_that_readers_see(out, layout) == FEWER
        assert dies(*kill, "run", job, "-o", out), kill
        assert rows_that_readers_see(out, layout) in (FEWER, ROWS), kill
        served = len(simulator.ledger())
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 0, (kill, ended.stderr)
        assert rows_that_readers_see(out, layout) == ROWS
        assert len(simulator.ledger()) == served, kill
        verified = batchrun("verify", out)
        assert verified.exit_code == 0, (kill, verified.stdout)
        assert not [path.name for path in out.iterdir() if path.name.endswith(".tmp")], kill
        if layout == "partitions":
            shared = (tmp_path / "dataset").rglob("*.parquet")
            assert sum(pq.read_metadata(path).num_rows for path in shared) == ROWS
