"""Runs over a Ray cluster whose actors, nodes and driver die, judged by the ledger of the simulator."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchrun.simulator import SimulatorConfig
from batchrun.store import in_flight
from tests import cli_process
from tests.cli_process import KEY, KEY_ENV, Ended, read_summary, wait_until, write_job, write_rows
from tests.crash.trial import MAX_IN_FLIGHT, Trial
from tests.endings import answer_body
from tests.fault_server import Exchange, answer, serving_aside
from tests.ray_cluster import RayCluster, actors_of
from tests.simulator_process import running_simulator

pytestmark = pytest.mark.sampled(0)  # some seconds each, and a cluster: all are for the rest

ROWS, FEW = 300, 120
SLOW = SimulatorConfig(latency_s=1.0)
"""With all these rows a run would last half a minute, so all actors have requests in flight whenever something dies,
however long a busy machine takes to start them.
"""


@pytest.fixture
def cluster(cluster_of: Callable[[int], RayCluster]) -> RayCluster:
    """A cluster with two nodes of one actor each."""
    return cluster_of(2)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What a local run brings."""
    with running_simulator() as simulator:
        trial = Trial(tmp_path_factory.mktemp("local") / "run", simulator, rows=ROWS)
        assert trial.converge()
        return trial.completions()


class RayTrial(Trial):
    """A run over the cluster, with what it leaves."""

    def start(self, cluster: RayCluster, *flags: str, **options: Any) -> "subprocess.Popen[str]":
        """The command line, running."""
        engine = ("--engine", "ray", "--ray-address", cluster.address)
        return cli_process.start("run", self.job, "-o", self.out, *engine, *flags, **options)

    def answered(self, rows: int) -> bool:
        """Whether so many rows have an answer."""
        return (self.out / "summary.json").exists() and len(self._simulator.ledger()) >= rows

    def in_log(self, event: str) -> int:
        """How often run.log has the event."""
        log = self.out / "run.log"
        return log.read_text().count(f'"event":"{event}"') if log.exists() else 0

    def end(self, process: "subprocess.Popen[str]", undisturbed: pa.Table) -> Ended:
        """The run ends well and keeps every promise."""
        ended = cli_process.finish(process)
        assert ended.exit_code == 0, ended
        self.judge(undisturbed)
        assert self.outcome.violations == []
        return ended

    def doubts(self) -> list[dict[str, Any]]:
        """What summary.json names as possibly billed."""
        named: list[dict[str, Any]] = read_summary(self.out)["possibly_billed"]
        return named


def test_a_run_outlives_every_end_of_its_driver(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    """Signals to all processes, as Ctrl-C in a terminal, drain the run: each request in flight still brings its answer.
    `kill -9` leaves no actor behind, and what its actors had in flight is named at the next start.
    """
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)

        def started() -> "subprocess.Popen[str]":
            actors, sent = trial.in_log("actor"), len(simulator.ledger())
            process = trial.start(cluster, start_new_session=True)
            wait_until(lambda: trial.in_log("actor") == actors + 2 and trial.answered(sent + 20), process)
            return process

        for number, exit_code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            process = started()
            os.killpg(process.pid, number)
            ended = cli_process.finish(process)
            assert ended.exit_code == exit_code, ended
            summary = read_summary(trial.out)
            assert summary["possibly_billed"] == []
            assert summary["rows"] - summary["pending"] == len(simulator.ledger())
        process = started()
        process.kill()
        process.communicate()
        trial._in_flight.append(in_flight.read(trial.out / "inflight.bin"))
        wait_until(lambda: not any(actors_of(raylet) for raylet in cluster.raylets))
        ended_at = time.time()
        time.sleep(1)
        assert max(line.arrived_s for line in simulator.ledger()) < ended_at
        quick = ("--set", f"limits.max_in_flight={ROWS}", "--set", "engine.actors=1")
        trial.end(trial.start(cluster, *quick), undisturbed)


def test_lost_calls_to_actors_lose_and_repeat_nothing(
    tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself loses one in ten calls before the actor gets it, and one in ten after it has run."""
    failures = {"num_failures": 12, "req_failure_prob": 10, "resp_failure_prob": 10, "in_flight_failure_prob": 0}
    lossy = json.dumps({"CoreWorkerService.grpc_client.PushTask": failures})
    monkeypatch.setenv("RAY_testing_rpc_failure", lossy)
    monkeypatch.setenv("RAY_testing_rpc_failure_avoid_intra_node_failures", "0")
    with running_simulator(SimulatorConfig(latency_s=0.4)) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=FEW)
        trial.end(trial.start(cluster), undisturbed.slice(0, FEW))
        assert len(simulator.ledger()) == FEW
    assert trial.doubts() == []
    assert trial.in_log("actor lost") == 0
    assert trial.in_log("call repeated") > 0


def test_a_silent_actor_is_given_up(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    """It is stopped by SIGSTOP, so the outcome of its requests is unknown; here after 4 s instead of 60."""
    quick = (
        "import sys; from batchrun.ray_engine import fleet; fleet.SILENT_S = 4.0; from batchrun.cli import main; main()"
    )
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        command = [sys.executable, "-c", quick, "run", trial.job, "-o", trial.out, "--engine", "ray"]
        process = subprocess.Popen(
            [*map(str, command), "--ray-address", cluster.address],
            env={**os.environ, KEY_ENV: KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: trial.in_log("actor") == 2 and trial.answered(30), process)
        (actor, *_) = actors_of(cluster.raylets[0])
        os.kill(actor, signal.SIGSTOP)
        ended = trial.end(process, undisturbed)
    assert "it has not answered for 4 s" in ended.stderr
    assert 1 <= len(trial.doubts()) <= MAX_IN_FLIGHT
    wait_until(lambda: actor not in actors_of(cluster.raylets[0]))


def test_a_killed_actor_and_node_leave_doubts(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    """Their requests are named with an upper bound, and sent again as after a reset connection; the others end where
    they are. The actor is replaced.
    """
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        process = trial.start(cluster)
        wait_until(lambda: trial.in_log("actor") == 2 and trial.answered(20), process)
        (actor,) = actors_of(cluster.raylets[0])
        os.kill(actor, signal.SIGKILL)
        wait_until(lambda: trial.in_log("actor") == 3, process)
        sent = len(simulator.ledger())
        wait_until(lambda: trial.answered(sent + 20), process)
        cluster.kill_node(cluster.raylets[1])
        ended = trial.end(process, undisturbed)
    lost = re.findall(r"was lost .*; requests in flight there, possibly billed: (\d+)", ended.stderr)
    assert len(lost) == trial.in_log("actor lost") == 2
    assert all(1 <= int(requests) <= MAX_IN_FLIGHT for requests in lost)
    assert len(trial.doubts()) == sum(map(int, lost))
    assert all(float(doubt["upper_bound_usd"]) > 0 for doubt in trial.doubts())


def test_the_drivers_dead_node_pauses_the_run(tmp_path: Path, cluster: RayCluster) -> None:
    """It can have no other actors: exit 5, and what was in flight is named. The cluster is lost with it."""

    async def ten_answers(exchange: Exchange) -> None:
        if len(server.exchanges) > 10:
            await exchange.silence()
        await exchange.send(answer(answer_body("fine")))

    with serving_aside(ten_answers) as server:
        out, source = tmp_path / "out", write_rows(tmp_path / "in.jsonl", 60)
        job = write_job(tmp_path / "job.toml", server.url, source, "[limits]\nmax_in_flight = 12\n")
        flags = ("--engine", "ray", "--ray-address", cluster.address, "--set", "engine.actors=1")
        process = cli_process.start("run", job, "-o", out, *flags)
        wait_until(lambda: len(server.exchanges) == 22, process)
        os.kill(cluster.head, signal.SIGKILL)
        ended = cli_process.finish(process)
    assert ended.exit_code == 5, ended
    assert ended.stderr.splitlines()[-1].startswith("Error: the Ray node that this process is on has died")
    assert ended.stdout == ""
    summary = read_summary(out)
    assert (summary["by_status"], len(summary["possibly_billed"])) == ({"ok": 10}, 12)
