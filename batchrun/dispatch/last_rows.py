"""The end of a run, when only rows that failed are left: no other row can then show whether the endpoint is well."""

from batchrun import attempt_caps
from batchrun.attempt_caps import History
from batchrun.dispatch.backlog import Backlog
from batchrun.job.settings import Retry
from batchrun.limits.gates import AnyGate
from batchrun.limits.outage import MANY_OUTAGE_ROWS
from batchrun.policy import ANSWERED, Judgement
from batchrun.records import Verdict


class LastRows:
    """Counts which rows were tried in this process, and the share that fails and recovers. One per event loop."""

    def __init__(self, backlog: Backlog, gate: AnyGate, retry: Retry, *, answered_before: bool) -> None:
        """`answered_before`: an earlier start of the run received an answer from this endpoint."""
        self._backlog = backlog
        self._gate = gate
        self._retry = retry
        self._answered_before = answered_before
        self.untried = 0  # rows in flight or at the gate that are on their first attempt in this process
        self._recovered = self._given_up = 0  # rows that were answered after a failure, and those that never were
        self._failing = 0.0  # the share of first attempts that fail
        self._refusing = 0.0  # the share of first attempts that get a 429
        self._recovering = 0.0  # the share of recent answers that are of rows which had failed
        self._answers = 0

    def ended(self, history: History, judgement: Judgement) -> None:
        """An attempt has ended; `history` includes it."""
        if judgement is ANSWERED:
            after_failure = history.attempts > 1
            self._answers += 1
            self._recovered += after_failure
            if not (after_failure or self._failing or self._refusing or self._recovering):
                return  # nothing fails: all shares stay at zero
            self._recovering += (after_failure - self._recovering) / min(self._answers, attempt_caps.SHARE_OF)
        failed = judgement.verdict in (Verdict.FREE, Verdict.MAYBE)  # although its row may be good
        self._failing = attempt_caps.share_of_first(self._failing, history, counts=failed)
        self._refusing = attempt_caps.share_of_first(self._refusing, history, counts=judgement.is_refusal)

    @property
    def may_be_at_fault(self) -> bool:
        """True if a row that fails may be at fault itself although no other row is answered."""
        # the endpoint must have answered before; the only row of a run counts from the start
        if not (self._answered_before or self._gate.successes or self._backlog.alone):
            return False
        left = self._backlog.left
        has_tried_all = not self.untried and self._backlog.drained
        # all rows left have failed: too few of them for an outage to show, or rows like these were mostly given up
        if has_tried_all and (left < MANY_OUTAGE_ROWS or self._given_up > self._recovered):
            return True
        # or nothing was answered for so long that the rows left are the likelier cause. Waiting longer is no way out:
        # while the circuit probes with one row a minute, they would take hours
        if not self._backlog.exhausted or left > attempt_caps.MOST_LEFT:
            return False
        return self._gate.unanswered_s > attempt_caps.patience_s(attempt_caps.END_S, left, self._retry)

    def gives_up(self, history: History) -> bool:
        """Whether the row has used up its attempts and is given up.

        The caps are higher where many attempts fail by chance. Only rows that recovered show how many do: other bad
        rows, which never recover, are no evidence for this one.
        """
        recovering = self._recovered / max(1, self._gate.successes) if self.may_be_at_fault else self._recovering
        given_up = attempt_caps.is_refused_for_good(history, self._retry, min(self._refusing, recovering))
        given_up |= attempt_caps.exhausted(history, self._retry, attempt_caps.stretch(min(self._failing, recovering)))
        self._given_up += given_up
        return given_up
