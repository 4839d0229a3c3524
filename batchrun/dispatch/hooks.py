"""How the caller of a run follows its progress and stops it."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from batchrun import signals
from batchrun.dispatch.result_queue import ResultQueue
from batchrun.run_summary import Summary
from batchrun.store.chunks import Mirror
from batchrun.telemetry.views import Views

if TYPE_CHECKING:
    from batchrun.telemetry.otel import OpenTelemetry

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
    may take after the first signal or after the deadline. `views` get every summary that is written.
    `mirror` keeps a copy of the sealed parts elsewhere.
    """

    progress: Callable[[Summary], None] = lambda summary: None
    note: Callable[[str], None] = lambda line: None
    host: Host | None = None
    command: str | None = None
    grace_s: float = GRACE_S
    views: Views | None = None
    mirror: Mirror | None = None

    @property
    def otel(self) -> "OpenTelemetry | None":
        """What also gets chunks and attempts as they end; None: nothing does."""
        return None if self.views is None else self.views.otel
