"""What jobs can ask for, over a Ray cluster: each run is compared with a local one, or with what the server saw."""

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.ray_engine.cluster import Cluster
from batchrun.ray_engine.sender import Ready
from batchrun.simulator import SimulatorConfig
from tests.cli_process import (
    KEY,
    KEY_ENV,
    batchrun,
    finish,
    holds_key,
    read_summary,
    start,
    wait_until,
    write_job,
    write_rows,
)
from tests.crash.verdict import SAME
from tests.endings import answer_body
from tests.fault_server import Exchange, answer, self_signed, serving_aside
from tests.jobs import job_over
from tests.pictures import PNG, data_url
from tests.ray_cluster import OWN, RayCluster, children_of, name_of
from tests.simulator_process import running_simulator

pytestmark = pytest.mark.sampled(0)  # a cluster and a start each: all are for the rest

SHARED = ("--set", "engine.cpus_per_actor=0.1", "--set", "engine.actors=1")
"""So many runs have room on one node at once."""


@pytest.fixture
def cluster(cluster_of: Callable[[int], RayCluster]) -> RayCluster:
    """A cluster with a node for actors."""
    return cluster_of(1)


def over(cluster: RayCluster) -> tuple[str, ...]:
    """The flags of a run over the cluster."""
    return ("--engine", "ray", "--ray-address", cluster.address, *SHARED)


def test_streams_images_and_both_dialects_bring_the_same(tmp_path: Path, cluster: RayCluster) -> None:
    """An image of 300 KB passes through Ray's object store."""
    rows, pictures = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "pictures.jsonl"
    shown = [
        {"id": row, "text": f"item {row}", "score": 0.5, "pic": data_url(PNG + bytes(300_000))} for row in range(5)
    ]
    pictures.write_text("".join(json.dumps(row) + "\n" for row in shown))
    with running_simulator() as simulator:
        job, painted = (write_job(tmp_path / f"{path.stem}.toml", simulator.url, path) for path in (rows, pictures))
        wanted = {
            "stream": (job, "request.stream=true"),
            "responses": (job, "endpoint.dialect=responses"),
            "images": (painted, 'request.images=["pic"]'),
        }
        running = {
            (name, engine): start("run", path, "-o", tmp_path / name / engine, "--set", setting, *flags)
            for name, (path, setting) in wanted.items()
            for engine, flags in (("local", ()), ("ray", over(cluster)))
        }
        ended = {key: finish(process) for key, process in running.items()}
    assert {key: end for key, end in ended.items() if end.exit_code} == {}
    for name in wanted:
        local, ray = (pq.read_table(tmp_path / name / engine / "completions.parquet") for engine in ("local", "ray"))
        assert ray.select(SAME) == local.select(SAME), name
    streamed = pq.read_table(tmp_path / "stream" / "ray" / "completions.parquet")
    assert streamed["time_to_first_token_s"].null_count == 0


def test_a_rotated_key_reaches_the_actors_over_tls(tmp_path: Path, cluster: RayCluster) -> None:
    """The certificate's authority comes from the driver, and the key is in no file of the run or of Ray."""
    certificate, file, new = self_signed(tmp_path), tmp_path / "key", tmp_path / "new"
    for path, key in ((file, "sk-old-canary-77"), (new, "sk-new-canary-77")):
        path.write_text(key)
        path.chmod(0o600)
    accepted = {"sk-old-canary-77"}
    refused: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        if len(server.exchanges) == 60:
            new.replace(file)
            accepted.clear()
            accepted.add("sk-new-canary-77")
        await asyncio.sleep(0.02)
        found = re.search(rb"(?i)^authorization: Bearer (.*)\r$", exchange.head, re.MULTILINE)
        assert found is not None
        if found[1].decode() in accepted:
            await exchange.send(answer(answer_body(f"fine, {found[1].decode()}")))
        else:
            refused.append(found[1])
            await exchange.send(answer(b'{"error": {"message": "wrong key"}}', status="401 Unauthorized"))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with serving_aside(script, context) as server:
        job = write_job(tmp_path / "job.toml", server.url, write_rows(tmp_path / "in.jsonl", 200))
        text = job.read_text().replace(
            'api_key_env = "BATCHRUN_TEST_KEY"', f'api_key_file = "{file}"\nca_file = "{certificate}.crt"'
        )
        job.write_text(text)
        began_at = time.time()
        ended = batchrun("run", job, "-o", tmp_path / "out", *over(cluster), "--set", "limits.max_in_flight=8")
    assert ended.exit_code == 0, ended
    assert read_summary(tmp_path / "out")["by_status"] == {"ok": 200}
    assert {bytes(key) for key in refused} == {b"sk-old-canary-77"}
    assert holds_key(tmp_path / "out", [b"canary-77"]) == []
    assert [path for path in files_of_ray(began_at) if b"canary-77" in path.read_bytes()] == []


def files_of_ray(since: float) -> list[Path]:
    """Ray's files that were written since then."""
    files = [path for path in Path("/tmp/ray").rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.stat().st_mtime >= since - 1]


def test_proxies_and_redirects_are_as_run_locally(tmp_path: Path, cluster: RayCluster) -> None:
    async def proxy(exchange: Exchange) -> None:
        assert exchange.head.startswith(b"POST http://model.example/v1/chat/completions ")
        await exchange.send(answer(answer_body("by proxy")))

    async def redirect(exchange: Exchange) -> None:
        await exchange.send(answer(b"", "Location: http://elsewhere.example/", status="307 Temporary Redirect"))

    source = write_rows(tmp_path / "in.jsonl", 20)
    with serving_aside(proxy) as first, serving_aside(redirect) as second:
        by_proxy = write_job(tmp_path / "proxy.toml", "http://model.example/v1", source)
        by_proxy.write_text(by_proxy.read_text().replace('api_key_env = "BATCHRUN_TEST_KEY"', 'auth = "none"'))
        moved = write_job(tmp_path / "moved.toml", second.url, source)
        proxied = f'endpoint.proxy="{first.url.removesuffix("/v1")}"'
        running = [
            start("run", by_proxy, "-o", tmp_path / "proxy", "--set", proxied, *over(cluster)),
            start("run", moved, "-o", tmp_path / "moved", *over(cluster)),
        ]
        through, away = (finish(process) for process in running)
    assert through.exit_code == 0, through
    assert len(first.exchanges) == 20
    assert away.exit_code == 2, away
    assert "307" in away.stdout


def test_budget_and_deadline_hold_over_actors(tmp_path: Path, cluster: RayCluster) -> None:
    source = write_rows(tmp_path / "in.jsonl", 400)
    with running_simulator(SimulatorConfig(latency_s=0.1)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 20\n")
        capped = start("run", job, "-o", tmp_path / "capped", "--max-cost", "0.05", *over(cluster))
        ended = finish(capped)
        assert ended.exit_code == 4, ended
        assert float(read_summary(tmp_path / "capped")["cost_usd"]) <= 0.05
        assert len(simulator.ledger()) == 400 - read_summary(tmp_path / "capped")["pending"]
        late = batchrun(
            "run",
            job,
            "-o",
            tmp_path / "late",
            "--deadline",
            "4s",
            "--set",
            "limits.requests_per_minute=300",
            *over(cluster),
        )
    assert late.exit_code == 4, late
    assert "deadline" in (read_summary(tmp_path / "late")["reason"] or "")


ENDPOINT = """
[[endpoint]]
url = "{url}"
name = "both"
api_key_env = "{key}"
"""


def test_several_endpoints_work_over_actors(
    tmp_path: Path, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request has its endpoint's own key; an endpoint that refuses its key is set aside, as in a local run."""
    seen = {"KEY_A": 0, "KEY_B": 0, "KEY_C": 0}

    async def script(exchange: Exchange) -> None:
        found = re.search(rb"(?i)^authorization: Bearer sk-(.*)-canary\r$", exchange.head, re.MULTILINE)
        assert found is not None
        seen[found[1].decode()] += 1
        if found[1] == b"KEY_C":
            await exchange.send(answer(b'{"error": {"message": "revoked"}}', status="401 Unauthorized"))
        else:
            await exchange.send(answer(answer_body("fine")))

    for key in seen:
        monkeypatch.setenv(key, f"sk-{key}-canary")
    source = write_rows(tmp_path / "in.jsonl", 90)
    with serving_aside(script) as one, serving_aside(script) as other:
        job = write_job(tmp_path / "job.toml", one.url, source)
        tables = [
            ENDPOINT.format(url=server.url, key=key, weight=weight)
            for server, key, weight in ((one, "KEY_A", 2), (other, "KEY_B", 1), (other, "KEY_C", 1))
        ]
        text = job.read_text()
        job.write_text("".join(tables) + text[text.index("[input]") :])
        ended = batchrun("run", job, "-o", tmp_path / "out", *over(cluster))
    assert ended.exit_code == 0, ended
    assert "endpoint KEY_C is set aside: HTTP 401" in ended.stderr
    summary = read_summary(tmp_path / "out")
    assert summary["by_status"] == {"ok": 90}
    assert [(each["label"], each["requests"]) for each in summary["endpoints"]][:2] == [
        ("KEY_A", seen["KEY_A"]),
        ("KEY_B", seen["KEY_B"]),
    ]
    assert seen["KEY_A"] + seen["KEY_B"] == 90
    assert min(seen["KEY_A"], seen["KEY_B"]) > 10
    assert (len(one.exchanges), len(other.exchanges)) == (seen["KEY_A"], seen["KEY_B"] + seen["KEY_C"])
    assert summary["possibly_billed"] == []


def test_actors_follow_the_requests_in_flight(tmp_path: Path, cluster: RayCluster) -> None:
    """One is ended when it has not been needed for a while, here for 1 s instead of 60, and none of its requests is
    lost.
    """
    quick = "from batchrun.ray_engine import fleet; fleet.SURPLUS_S = 1.0; from batchrun.cli import main; main()"
    latency_s = 1.0

    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(latency_s)
        await exchange.send(answer(answer_body("fine")))

    out = tmp_path / "out"

    def in_log(event: str) -> int:
        log = out / "run.log"
        return log.read_text().count(f'"event":"{event}"') if log.exists() else 0

    def tune(most: int) -> None:
        assert batchrun("tune", out, "--max-in-flight", str(most)).exit_code == 0

    more = "[limits]\nmax_in_flight = 12\n[engine]\nmax_actors = 3\nrequests_per_actor = 4\n"
    with serving_aside(script) as server:
        job = write_job(tmp_path / "job.toml", server.url, write_rows(tmp_path / "in.jsonl", 1_000), more)
        process = subprocess.Popen(
            [sys.executable, "-c", quick, "run", str(job), "-o", str(out), *over(cluster)],
            env={**os.environ, KEY_ENV: KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: in_log("actor") == 3, process)
        tune(2)
        wait_until(lambda: in_log("actor ended") == 2, process)
        tune(8)
        wait_until(lambda: in_log("actor") == 4, process)
        latency_s = 0.0
        ended = finish(process)
    assert ended.exit_code == 0, ended
    assert len(server.exchanges) == 1_000
    summary = read_summary(out)
    assert (summary["by_status"], summary["possibly_billed"]) == ({"ok": 1_000}, [])
    assert in_log("actor lost") == 0


def test_a_start_that_cannot_work_is_one_line(tmp_path: Path, cluster: RayCluster) -> None:
    source = write_rows(tmp_path / "in.jsonl", 3)
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", source)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"
    too_large = ("--set", "engine.cpus_per_actor=64", "--set", "engine.start_timeout_s=2")
    running: list[tuple[subprocess.Popen[str], int, str]] = [
        (
            start("run", job, "-o", tmp_path / "a", "--engine", "ray", "--ray-address", nowhere),
            2,
            "can't connect to",
        ),
        (start("run", job, "-o", tmp_path / "b", *over(cluster), *too_large), 5, "no Ray actor could start within 2 s"),
    ]
    for process, exit_code, line in running:
        ended = finish(process)
        assert ended.exit_code == exit_code, ended
        errors = [each for each in ended.stderr.splitlines() if each.startswith("Error: ")]
        assert len(errors) == 1, ended.stderr
        assert line in errors[0]
        assert "Traceback" not in ended.stderr


def test_an_actor_elsewhere_needs_a_reachable_address() -> None:
    here, elsewhere = (Ready(1, host, 8, ()) for host in (socket.gethostname(), "another-machine"))
    for url, refused in (
        ("http://127.0.0.1:9/v1", True),
        ("http://localhost:9/v1", True),
        ("https://a.example/v1", False),
    ):
        cluster = Cluster(job_over(None, endpoint={"url": url, "api_key_env": "KEY"}), "auto", print)
        cluster._require_reachable(here)
        if refused:
            with pytest.raises(JobError, match="name an address that all nodes reach"):
                cluster._require_reachable(elsewhere)
        else:
            cluster._require_reachable(elsewhere)


def test_a_local_ray_ends_with_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment of its processes nor their command lines have it; `kill -9` ends all of them,
    also Ray's agents, which would stay for a minute.
    """
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)

    async def slow(exchange: Exchange) -> None:
        await asyncio.sleep(30)

    began_at = time.time()
    with serving_aside(slow) as server:
        job = write_job(tmp_path / "job.toml", server.url, write_rows(tmp_path / "in.jsonl", 20))
        process = start("run", job, "-o", tmp_path / "out", "--engine", "ray", "--set", "engine.actors=1")
        wait_until(lambda: len(server.exchanges) >= 8, process)
        family = descendants_of(process.pid)
        assert len(family) >= 3
        for pid in family:
            for what in ("environ", "cmdline"):
                assert KEY.encode() not in Path(f"/proc/{pid}/{what}").read_bytes(), what
        assert sum(name_of(pid).endswith("Agent") for pid in family) == 2
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        killed_at = time.monotonic()
        wait_until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in family))
        assert time.monotonic() - killed_at < 30
    assert [path for path in files_of_ray(began_at) if KEY.encode() in path.read_bytes()] == []


def descendants_of(pid: int) -> list[int]:
    """All processes below this one."""
    children = children_of(pid)
    return children + [each for child in children for each in descendants_of(child)]
