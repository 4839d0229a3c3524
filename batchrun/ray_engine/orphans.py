"""Ends the helpers of a local Ray with it, also after `kill -9`."""

import os
import select
import signal
import threading
from pathlib import Path

AGENTS = "Agent"
"""The ends of these helpers' names: ray::DashboardAgent, ray::RuntimeEnvAgent (Ray 2.60)."""


def end_agents_with(raylet: int) -> None:
    """Kills the agents of this raylet as soon as it is dead. They would live for another minute and try to report its
    death to a cluster that is gone.

    A raylet dies with its driver, by the kernel. Without pidfds (before Linux 5.3) nothing happens.
    """
    agents = []
    try:
        watched = os.pidfd_open(raylet)
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
                name = (place / "cmdline").read_bytes().rstrip(b"\0 ").decode("utf-8", "replace")
            except (OSError, ValueError):
                continue  # it has just ended
            if parent == raylet and name.endswith(AGENTS):
                agents.append(os.pidfd_open(int(place.name)))
    except (AttributeError, OSError):
        return
    threading.Thread(target=_wait_and_end, args=(watched, agents), name="orphans", daemon=True).start()


def _wait_and_end(watched: int, agents: list[int]) -> None:
    select.select([watched], [], [])  # readable when the process has ended: pidfd_open(2)
    for agent in agents:
        try:
            signal.pidfd_send_signal(agent, signal.SIGKILL)
        except ProcessLookupError:
            continue
