"""What the caller of a run wants to hear of it, and how it is stopped."""

from collections.abc import Callable

import msgspec

from batchrun import signals
from batchrun.dispatch.result_queue import ResultQueue
from batchrun.records import Summary

GRACE_S = 20.0
"""How long the first signal lets requests in flight end; Kubernetes kills after 30."""


class Host(msgspec.Struct, frozen=True):
    """A program that runs us in a thread beside its own: how it stops the run, and what it reads of it.

    `replay`: rows that earlier starts settled are handed over first.
    """

    stop: signals.StopRequest
    results: ResultQueue
    replay: bool


class Hooks(msgspec.Struct, frozen=True):
    """`progress` is called at the start and twice a second, `note` for single lines.

    `command` is the command line that resumes the run, but for its directory. `grace_s`: how long requests in flight
    may take after the first signal, or after the deadline.
    """

    progress: Callable[[Summary], None] = lambda summary: None
    note: Callable[[str], None] = lambda line: None
    host: Host | None = None
    command: str | None = None
    grace_s: float = GRACE_S
