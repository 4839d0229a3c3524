"""Writes what a gate learns and decides to the run's log."""

from batchrun.dispatch.runlog import RunLog
from batchrun.limits.admission import Limit, Phase


class GateLog:
    """The callbacks of one gate. `label` is the endpoint's name where there are several, else empty."""

    def __init__(self, log: RunLog, label: str = "") -> None:
        self.log = log
        self._named = {"endpoint": label} if label else {}

    def phase_changed(self, before: Phase, after: Phase) -> None:
        """The circuit is in another phase."""
        why = getattr(after, "why", None)
        self.log.write("gate", before=type(before).__name__, after=type(after).__name__, why=why, **self._named)

    def rate_changed(self, limit: Limit, before: float | None, after: float | None, why: str) -> None:
        """A rate per minute has changed; None: no limit."""
        self.log.write("pace", limit=limit, before=before, after=after, why=why, **self._named)

    def refusals_explained(self, kind: str, why: str) -> None:
        """Refusals have another explanation."""
        self.log.write("refusals", kind=kind, why=why, **self._named)
