"""Runs over a Ray cluster whose actors, nodes and driver die, judged by the ledger of the simulator."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchrun.simulator import SimulatorConfig
from batchrun.store import in_flight
from tests import cli_process
from tests.cli_process import Ended, read_summary, wait_until
from tests.crash.trial import MAX_IN_FLIGHT, Trial
from tests.ray_cluster import OWN, RayCluster, actors_of, ray_cluster
from tests.simulator_process import running_simulator

pytestmark = pytest.mark.sampled(0)  # some seconds each, and a cluster: all are for the rest

ROWS = 120
SLOW = SimulatorConfig(latency_s=0.4)
"""Slow enough that all actors have requests in flight whenever something dies."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A cluster with two nodes of one actor each."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in OWN.items():
            patched.setenv(name, value)
        with ray_cluster(2) as started:
            yield started


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


def test_a_killed_node_leaves_its_requests_in_doubt(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    """They are named with an upper bound, and sent again as after a reset connection; the others end on their node."""
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        process = trial.start(cluster)
        wait_until(lambda: trial.in_log("actor") == 2 and trial.answered(30), process)
        cluster.kill_node(cluster.raylets[0])
        ended = trial.end(process, undisturbed)
    cluster.add_node()
    lost = int(re.findall(r"was lost .*; (\d+) requests that it had may have been billed", ended.stderr)[0])
    assert 1 <= lost <= MAX_IN_FLIGHT
    assert len(trial.doubts()) == lost
    assert all(float(doubt["upper_bound_usd"]) > 0 for doubt in trial.doubts())


def test_a_killed_actor_is_replaced(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        process = trial.start(cluster, "--set", "engine.actors=1")
        for kills in (1, 2):
            wait_until(lambda kills=kills: trial.in_log("actor") == kills and trial.answered(30 * kills), process)
            (actor,) = [pid for raylet in cluster.raylets for pid in actors_of(raylet)]
            os.kill(actor, signal.SIGKILL)
        trial.end(process, undisturbed)
    assert trial.in_log("actor lost") == 2
    assert len(trial.doubts()) <= 2 * MAX_IN_FLIGHT


def test_a_killed_driver_leaves_no_actor_behind(tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table) -> None:
    """What its actors had in flight is named at the next start, as after any other kill."""
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        process = trial.start(cluster)
        wait_until(lambda: trial.in_log("actor") == 2 and trial.answered(30), process)
        process.kill()
        process.communicate()
        trial._in_flight.append(in_flight.read(trial.out / "inflight.bin"))
        wait_until(lambda: not any(actors_of(raylet) for raylet in cluster.raylets))
        ended_at = time.time()
        time.sleep(1)
        assert max(line.arrived_s for line in simulator.ledger()) < ended_at
        trial.end(trial.start(cluster), undisturbed)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_all_processes_drains_the_run(
    tmp_path: Path, cluster: RayCluster, undisturbed: pa.Table, number: int, exit_code: int
) -> None:
    """As Ctrl-C in a terminal: every request in flight still brings its answer."""
    with running_simulator(SLOW) as simulator:
        trial = RayTrial(tmp_path / "run", simulator, rows=ROWS)
        process = trial.start(cluster, start_new_session=True)
        wait_until(lambda: trial.in_log("actor") == 2 and trial.answered(30), process)
        os.killpg(process.pid, number)
        ended = cli_process.finish(process)
        assert ended.exit_code == exit_code, ended
        summary = read_summary(trial.out)
        assert summary["possibly_billed"] == []
        assert summary["rows"] - summary["pending"] == len(simulator.ledger())
        trial.end(trial.start(cluster), undisturbed)
