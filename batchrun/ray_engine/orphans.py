"""Ends the helpers of a local Ray with it, also after `kill -9`: `python orphans.py RAYLET` waits beside it."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path


def end_children_with(raylet: int) -> None:
    """Kills what this raylet has started so far, its agents among them, as soon as it is dead. They would live for
    another minute and try to report its death to a cluster that is gone.

    A raylet dies with its driver, by the kernel, and its workers with it: so another process waits for that.
    """
    command = [sys.executable, "-I", "-S", __file__, str(raylet)]
    silent = subprocess.DEVNULL
    subprocess.run(command, env={}, start_new_session=True, stdin=silent, stdout=silent, stderr=silent, check=False)  # noqa: S603


def _wait_and_end(raylet: int) -> None:
    children = []
    try:
        watched = os.pidfd_open(raylet)
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
            if parent == raylet:
                children.append(os.pidfd_open(int(place.name)))
    except (AttributeError, OSError):
        return  # before Linux 5.3, or they have ended
    if os.fork():
        return  # a worker that ends kills its children, but not theirs (Ray 2.60)
    select.select([watched], [], [])  # readable when the process has ended: pidfd_open(2)
    for child in children:
        try:
            signal.pidfd_send_signal(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


if __name__ == "__main__":
    _wait_and_end(int(sys.argv[1]))
