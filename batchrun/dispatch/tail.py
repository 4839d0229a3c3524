"""The end of a run, when no row is left but such as have failed: who can show then whether the endpoint is well?"""

from batchrun import policy
from batchrun.dispatch.backlog import Backlog
from batchrun.gate.gate import Gate
from batchrun.job.job import Retry
from batchrun.policy import History, Judgement


class Tail:
    """Knows which rows have been tried, and how many of them fail. One per event loop."""

    def __init__(self, backlog: Backlog, gate: Gate, retry: Retry, *, answered_before: bool) -> None:
        """`answered_before`: an earlier start of the run got an answer from this endpoint."""
        self._backlog = backlog
        self._gate = gate
        self._retry = retry
        self._answered_before = answered_before
        self._untried = 0  # rows that are out, or wait at the gate, for the first time in this process
        self._healed = 0  # rows that were answered after they had failed
        self._failing = 0.0  # the share of first attempts that fail

    def handed_out(self) -> None:
        """A row is out that was not tried before in this process."""
        self._untried += 1

    def tried(self) -> None:
        """Such a row has had its first attempt."""
        self._untried -= 1

    def healed(self) -> None:
        """A row was answered after it had failed."""
        self._healed += 1

    def ended(self, history: History, judgement: Judgement) -> None:
        """An attempt has ended so."""
        self._failing = policy.failing_share(self._failing, history, judgement)

    @property
    def is_reached(self) -> bool:
        """True when no row is left but such as have failed in this process, in a run whose endpoint has answered: no
        other row can show then whether the endpoint is well. The only row of a run has none beside it from the start.
        """
        answered = self._answered_before or self._gate.successes > 0 or self._backlog.alone
        return answered and not self._untried and self._backlog.drained

    def gives_up(self, history: History) -> bool:
        """Whether the row has used up its attempts. At the tail the rows that are left may be the reason themselves why
        so many fail: rows that were answered in the end show there how many fail by chance.
        """
        share = self._failing
        if self.is_reached:
            share = min(share, self._healed / max(1, self._gate.successes))
        return policy.exhausted(history, self._retry, policy.stretch(share))
