"""Runs whose requests are sent by the actors of a Ray cluster: what comes out is what a local run brings."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.ray_engine.settings import address_of, require_possible
from tests.cli_process import batchrun, read_summary, write_job, write_rows
from tests.crash.verdict import SAME
from tests.endings import answer_body
from tests.fault_server import Exchange, answer, serving_aside
from tests.jobs import job_over
from tests.ray_cluster import OWN

OF_THE_EXCHANGE = ("request_id", "finished_at", "latency_s", "time_to_first_token_s")
"""Columns that name a time or an id of one exchange."""


@pytest.mark.heavy
def test_answers_over_ray_equal_local_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of them, in every column that is no time or id."""
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    source, more = write_rows(tmp_path / "in.jsonl", 60), "[output]\nraw = 'always'\n[engine]\nactors = 1\n"

    async def fixed(exchange: Exchange) -> None:
        await exchange.send(answer(answer_body(hashlib.sha256(exchange.body).hexdigest())))

    with serving_aside(fixed) as server:
        job = write_job(tmp_path / "job.toml", server.url, source, more)
        for engine in ("local", "ray"):
            ended = batchrun("run", job, "-o", tmp_path / engine, "--engine", engine)
            assert (ended.exit_code, "Warning" in ended.stderr) == (0, False), ended
    assert len(server.exchanges) == 120
    local, ray = (pq.read_table(tmp_path / out / "completions.parquet") for out in ("local", "ray"))
    assert set(SAME) <= set(local.column_names) - set(OF_THE_EXCHANGE)
    assert ray.drop_columns(list(OF_THE_EXCHANGE)) == local.drop_columns(list(OF_THE_EXCHANGE))
    assert read_summary(tmp_path / "ray")["cost_usd"] == read_summary(tmp_path / "local")["cost_usd"]
    assert '"wire":"ray"' in (tmp_path / "ray" / "run.log").read_text()


def test_what_ray_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_over(None, engine={"name": "ray", "ray_address": "ray://head:10001"})
    with pytest.raises(JobError, match="Ray Client is not supported"):
        address_of(job, {})
    with pytest.raises(JobError, match="max_actors 1: is less than"):
        require_possible(job_over(None, engine={"name": "ray", "max_actors": 1}))
    monkeypatch.setitem(sys.modules, "ray", None)  # as where the package is not installed
    with pytest.raises(JobError, match=r"pip install 'batchrun\[ray\]'"):
        require_possible(job_over(None, engine={"name": "ray"}))


def test_the_address_is_the_flags_then_the_environments() -> None:
    named = job_over(None, engine={"name": "ray", "ray_address": "head:6379"})
    unnamed = job_over(None, engine={"name": "ray"})
    assert address_of(named, {"RAY_ADDRESS": "other:1"}) == "head:6379"
    assert address_of(unnamed, {"RAY_ADDRESS": "other:1"}) == "other:1"
    assert address_of(unnamed, {}) == "local"


def test_ray_is_loaded_only_for_its_engine(tmp_path: Path) -> None:
    code = "import sys, batchrun.cli, batchrun.api, batchrun.ray_engine.cluster; print('ray' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert shown.stdout == "False\n"
