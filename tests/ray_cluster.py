"""A Ray cluster of several nodes on this machine, in a process of its own, whose nodes a test can kill.

Its head has no CPU, so actors are on the other nodes, and the driver, which is on the head's, outlives them. A start
takes ten seconds of CPU, so all tests share one cluster: see the fixture `cluster_of` in tests/conftest.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORE_BYTES = 80_000_000  # the least that Ray allows is 75 MiB

OWN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
"""What its processes and its drivers have in their environment: without it Ray writes a token to the home directory."""


@dataclass
class RayCluster:
    """`raylets` are the processes of the nodes beside the head, oldest first: killing one kills all of its node."""

    address: str
    process: "subprocess.Popen[str]"
    head: int
    raylets: list[int] = field(default_factory=list)

    @property
    def has_head(self) -> bool:
        """Without it the cluster is of no use."""
        return self.head in children_of(self.process.pid)

    def add_node(self) -> int:
        """A node with one CPU; the id of its raylet."""
        self.raylets.append(int(self._reply("add")))
        return self.raylets[-1]

    def kill_node(self, raylet: int) -> None:
        """As when a machine loses its power, as far as one machine can play that: all processes of the node die."""
        self.raylets.remove(raylet)
        workers = children_of(raylet)
        for pid in (raylet, *workers):
            os.kill(pid, signal.SIGKILL)

    def _reply(self, order: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """A cluster that has only its head yet, ended with the block."""
    command = [sys.executable, "-m", "tests.ray_cluster"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, env={**os.environ, **OWN}, **pipes)  # type: ignore[call-overload]
    try:
        address, _, head = process.stdout.readline().strip().partition(" ")
        assert address, "the cluster did not start"
        yield RayCluster(address, process, int(head))
    finally:
        process.communicate(timeout=60)  # the end of its orders ends it


def children_of(pid: int) -> list[int]:
    """The living processes that this one has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.parent.name))
    return found


def actors_of(raylet: int) -> list[int]:
    """The processes of our actors on the node."""
    return [pid for pid in children_of(raylet) if name_of(pid) == "ray::Sender"]


def name_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ").decode("utf-8", "replace").split(".")[0]
    return ""


def _serve() -> None:
    warnings.simplefilter("ignore")
    from ray.cluster_utils import Cluster

    head: dict[str, Any] = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    # no test looks at what these do, and each is a Python process
    head |= {"no_monitor": True, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, _raylet_of(cluster.head_node), flush=True)
    for _ in sys.stdin:
        print(_raylet_of(cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)), flush=True)
    cluster.shutdown()


def _raylet_of(node: Any) -> int:
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


if __name__ == "__main__":
    os.environ.update(OWN)
    _serve()
