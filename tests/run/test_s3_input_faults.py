"""Runs over input in a real S3 server that fails, or whose objects change while they are read."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun as command
from tests.cli_process import finish, start, wait_until, write_job, write_rows
from tests.s3_server import BUCKET, S3Server, environ_for, environment, fails, proxy_before
from tests.simulator_process import RunningSimulator, running_simulator

pytestmark = pytest.mark.sampled(0)  # a server of its own: in `make test-rest`

ROWS = 60
MORE = "[limits]\nmax_in_flight = 2\n[output]\nchunk_rows = 10\npath = '{out}'\n"


@pytest.fixture(scope="module")
def api() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02)) as simulator:
        yield simulator


def job(s3: S3Server, api: RunningSimulator, folder: Path, name: str, content: bytes | None = None) -> Path:
    """A job over an object of that name."""
    rows = write_rows(folder / "rows.jsonl", ROWS).read_bytes() if content is None else content
    s3.put(f"{BUCKET}/in/{name}", gzip.compress(rows) if name.endswith(".gz") else rows)
    return write_job(folder / "job.toml", api.url, f"s3://{BUCKET}/in/{name}", MORE.format(out=folder / "out"))


@pytest.mark.parametrize("fault", ["500", "503", "cut", "slow"])
def test_a_read_that_fails_is_repeated(s3: S3Server, api: RunningSimulator, tmp_path: Path, fault: str) -> None:
    made = job(s3, api, tmp_path, f"{fault}.jsonl.gz")
    with proxy_before(s3, fails("GET .*/in/", fault, times=1)) as proxy, environment(environ_for(proxy.url)):
        shown = command("run", made)
    assert shown.exit_code == 0, shown.stderr
    assert pq.read_metadata(tmp_path / "out" / "completions.parquet").num_rows == ROWS


def test_a_store_staying_away_ends_the_start(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    """The next one resumes."""
    made = job(s3, api, tmp_path, "away.jsonl")
    with proxy_before(s3) as proxy, environment(environ_for(proxy.url)):
        process = start("run", made)
        wait_until(lambda: (tmp_path / "out" / "parts").exists() and len(api.ledger()) > 0, process)
        proxy.script = fails(".", "503")
        shown = finish(process)
    assert shown.exit_code in (0, 5), shown.stderr  # it may have read all before
    if shown.exit_code == 5:
        assert "can't be read" in shown.stderr.splitlines()[-1]
        assert "Traceback" not in shown.stderr
    shown = command("run", made)
    assert shown.exit_code == 0, shown.stderr
    assert pq.read_metadata(tmp_path / "out" / "completions.parquet").num_rows == ROWS


def test_an_object_changing_midway_is_noticed(s3: S3Server, api: RunningSimulator, tmp_path: Path) -> None:
    made = job(s3, api, tmp_path, "changes.jsonl")
    before = len(api.ledger())
    process = start("run", made)
    wait_until(lambda: len(api.ledger()) > before, process)
    rows = [json.loads(line) for line in s3.read(f"{BUCKET}/in/changes.jsonl").splitlines()]
    rows[ROWS - 1]["text"] = "another last row"
    s3.put(f"{BUCKET}/in/changes.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    shown = finish(process)
    assert shown.exit_code == 2, (shown.stdout, shown.stderr)
    assert "changes.jsonl" in shown.stderr
    again = command("run", made)
    assert again.exit_code == 0, again.stderr  # no answer is lost by it, so it needs no consent
    assert "changes.jsonl had" in again.stderr
    table = pq.read_table(tmp_path / "out" / "completions.parquet")
    assert table.column("text").to_pylist()[-1] == "another last row"
