"""The end of a run, when no row is left but such as have failed: who can show then whether the endpoint is well?"""

from batchrun import attempt_caps
from batchrun.attempt_caps import History
from batchrun.dispatch.backlog import Backlog
from batchrun.job.job import Retry
from batchrun.limits.gate import Gate
from batchrun.policy import Judgement


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
        self._refusing = 0.0  # the share that is refused with a 429
        self._healing = 0.0  # the share of answers, lately, that are of rows which had failed
        self._answers = 0

    def handed_out(self) -> None:
        """A row is out that was not tried before in this process."""
        self._untried += 1

    def tried(self) -> None:
        """Such a row has had its first attempt, or goes back without one."""
        self._untried -= 1

    def answered(self, *, healed: bool) -> None:
        """A row was answered; `healed`: after it had failed."""
        self._healed += healed
        self._answers += 1
        self._healing += (healed - self._healing) / min(self._answers, attempt_caps.SHARE_OF)

    def ended(self, history: History, judgement: Judgement) -> None:
        """An attempt has ended so."""
        self._failing = attempt_caps.failing_share(self._failing, history, judgement)
        self._refusing = attempt_caps.refused_share(self._refusing, history, judgement)

    @property
    def is_reached(self) -> bool:
        """True when no row is left but such as have failed in this process, in a run whose endpoint has answered: no
        other row can show then whether the endpoint is well. The only row of a run has none beside it from the start.

        Rows that were not tried may be left as well, if they are few and nothing was answered for so long as they are
        many: what was tried of them, here and there, has failed, and the next hours would be spent on one a minute.
        """
        if not (self._answered_before or self._gate.successes or self._backlog.alone):
            return False
        if not self._untried and self._backlog.drained:
            return True
        left = self._untried + self._backlog.untried
        if not self._backlog.exhausted or left > attempt_caps.MOST_LEFT:
            return False
        return self._gate.unanswered_s > attempt_caps.patience_s(attempt_caps.TAIL_S, left, self._retry)

    def gives_up(self, history: History) -> bool:
        """Whether the row has used up its attempts. They are more where many fail by chance: how many do is shown by
        rows that were answered in the end. Bad rows beside it, that never are, say nothing for this one.
        """
        healing = self._healed / max(1, self._gate.successes) if self.is_reached else self._healing
        if attempt_caps.is_refused_for_good(history, self._retry, min(self._refusing, healing)):
            return True
        return attempt_caps.exhausted(history, self._retry, attempt_caps.stretch(min(self._failing, healing)))
