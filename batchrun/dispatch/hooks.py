"""How the caller of a run follows its progress and stops it."""

from collections.abc import Callable

import msgspec

from batchrun import signals
from batchrun.dispatch.result_queue import ResultQueue
from batchrun.records import Summary
from batchrun.store.chunks import Mirror

GRACE_S = 20.0
"""How long requests in flight may take after the first signal. Kubernetes kills after 30 s."""


class Host(msgspec.Struct, frozen=True):
    """A program that runs batchrun in a thread: how it stops the run, and the queue it reads results from.

    `replay`: rows that earlier starts settled are put into the queue first.
    """

    stop: signals.StopRequest
    results: ResultQueue
    replay: bool


class Hooks(msgspec.Struct, frozen=True):
    """`progress` is called at the start and twice a second, `note` for single lines.

    `command` is the command line that resumes the run, without its directory. `grace_s`: how long requests in flight
    may take after the first signal or after the deadline. `shown` gets every summary that is written, in any thread.
    `mirror` keeps a copy of the sealed parts elsewhere.
    """

    progress: Callable[[Summary], None] = lambda summary: None
    note: Callable[[str], None] = lambda line: None
    host: Host | None = None
    command: str | None = None
    grace_s: float = GRACE_S
    shown: Callable[[Summary], None] = lambda summary: None
    mirror: Mirror | None = None
