"""How much disk a run takes at most, beyond what does not grow with its rows."""

import json
import os
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrun.simulator import SimulatorConfig
from tests import level
from tests.cli_process import finish, start, write_job
from tests.simulator_process import RunningSimulator, running_simulator

pytestmark = pytest.mark.heavy

ROW_BYTES = 20_000
MORE = """[output]
{layout}
chunk_bytes = 1_000_000
[limits]
max_in_flight = 64
"""


@pytest.fixture(scope="module")
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.001)) as simulator:
        yield simulator


def used(folder: Path) -> int:
    """Bytes of disk below the folder; a file with two names counts once."""
    sizes: dict[int, int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(path, name))  # noqa: PTH118  (fast, since this polls)
            except FileNotFoundError:
                continue
            sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def peak(folder: Path, api: RunningSimulator, layout: str, rows: int) -> tuple[int, int]:
    """The most disk that a run of so many rows took, and the bytes of its result. Nothing in the rows compresses."""
    folder.mkdir()
    random = level.seeded("disk")
    with (folder / "in.jsonl").open("w") as lines:
        for row in range(rows):
            more = b64encode(random.randbytes(ROW_BYTES)).decode()
            lines.write(json.dumps({"text": "x", "lang": ("de", "en")[row % 2], "more": more}) + "\n")
    job = write_job(folder / "job.toml", api.url, folder / "in.jsonl", MORE.format(layout=layout))
    process, most = start("run", job, "-o", folder / "out"), 0
    while process.poll() is None:
        most = max(most, used(folder / "out"))
        time.sleep(0.005)
    assert finish(process).exit_code == 0
    return most, sum(path.stat().st_size for path in (folder / "out" / "completions").rglob("*.parquet"))


@pytest.mark.parametrize(("layout", "times"), [('layout = "parts"', 1.3), ('partition_by = ["lang"]', 2.4)])
def test_each_further_row_takes_the_stated_disk(
    tmp_path: Path, api: RunningSimulator, layout: str, times: float
) -> None:
    """1.3 times the output in parts (docs/scale.md), and 1 GB for what does not grow: the chunks at work."""
    few, many = (peak(tmp_path / str(rows), api, layout, rows) for rows in (100, 400))
    assert many[1] - few[1] > 4_000_000
    assert many[0] - few[0] <= times * (many[1] - few[1])
    assert few[0] <= times * few[1] + 60_000_000
