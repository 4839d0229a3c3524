"""Ends a run early: first what is in flight may end, then nothing may."""

import asyncio

import msgspec

from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.runlog import RunLog
from batchrun.dispatch.worker import Workers
from batchrun.errors import ExitCode
from batchrun.limits.admission import Stop
from batchrun.records import Notice
from batchrun.report.wording import plural


class Shutdown:
    """Ends the run early, on a signal or for the host program.

    `abandoned` is how many requests were still in flight at the end.
    """

    def __init__(self, workers: Workers, hooks: Hooks, log: RunLog) -> None:
        self._workers = workers
        self._hooks = hooks
        self.log = log
        self._by: str | None = None
        self.abandoned = 0

    def request(self, by: str, exit_code: ExitCode) -> None:
        """The first call ends admission and lets requests in flight end within the grace; the second ends them now."""
        if self._by is not None:
            self._workers.cancel()
            return
        self._by = by
        in_flight, grace_s = self._workers.gate.in_flight, self._hooks.grace_s
        self.log.write("signal", name=by, in_flight=in_flight)
        drain = f"waiting up to {grace_s:g} s for {plural(in_flight, 'request')} in flight"
        fields = {"name": by, "in_flight": in_flight, "grace_s": grace_s}
        self._hooks.note(Notice(f"{by}: {drain}; send it again to stop now", "signal", **fields))
        self._workers.close(Stop(exit_code, f"{by}: drained"))
        asyncio.get_running_loop().call_later(grace_s, self._workers.cancel)

    def final_stop(self, stop: Stop | None) -> Stop | None:
        """The stop, with the number of abandoned requests, which is known only at the end."""
        if stop is None or self._by is None or not self.abandoned:
            return stop
        abandoned = plural(self.abandoned, "request")
        return msgspec.structs.replace(stop, why=f"{self._by}: stopped at once; {abandoned} in flight abandoned")
