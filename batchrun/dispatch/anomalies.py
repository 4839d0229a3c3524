"""Answers and settled rows that need a warning or stop the run: nothing is kept per row. PURE."""

from collections import deque

from batchrun.errors import ExitCode
from batchrun.limits.admission import Stop
from batchrun.policy import CONTENT_POLICY, QUOTA, Judgement
from batchrun.records import OK, RowError, Status, Verdict

FIRST_ROWS = 40
"""How many rows show whether nearly all are filtered. Ten would be too few: a file may begin with ten blocked ones."""

NEARLY_ALL = 0.95  # 38 of 40: two good rows may be among them

WELL_AGAIN = 0.5
"""After a stop, and in a resumed run, refusals can stop the run again only after the refused share of the last rows has
been this low: a file that is really full of refused rows stops one start only."""

MAX_REASONS = 20
MAX_REASON_CHARS = 100
"""Bounds of the lists that the summary shows."""


class Anomalies:
    """`unknown_finish_reasons` are those that batchrun does not know, `unpriced_tiers` the service tiers of answers
    without a known price, `unpriced_usage` what answers used that no price of text covers.

    `example_error` is the error of the first row that failed; one of a bad request comes first, as a setting may fix
    it.
    """

    def __init__(self, *, quota_patience_s: float, resumed: bool, retried: bool = False) -> None:
        """`quota_patience_s`: how long a quota may refuse every request before the run pauses. `resumed`: the run's
        first rows were settled by an earlier start. `retried`: settled rows are sent again, perhaps filtered ones, so
        refusals in a row prove nothing.
        """
        self.unknown_finish_reasons: list[str] = []
        self.unpriced_tiers: list[str] = []
        self.unpriced_usage: list[str] = []
        self.example_error: str | None = None
        self._quota_patience_s = quota_patience_s
        self.quota_refused_since_s: float | None = None
        self._example_is_curable = False
        self._settled = self._filtered = 0
        self._watch_first = not resumed
        self._watch_last = not resumed
        self._retried = retried
        self._refused: deque[bool] = deque(maxlen=FIRST_ROWS)
        self._refused_count = 0
        self._is_calm = False  # another row without an error changes nothing here

    def escalate_quota(self, judgement: Judgement, now_s: float) -> Judgement:
        """The same judgement; but a quota that has refused every request for too long pauses the run."""
        if judgement.verdict is OK:
            self.quota_refused_since_s = None
        if judgement.error is None or judgement.error.kind != QUOTA or judgement.verdict is not Verdict.SLOW:
            return judgement
        if self.quota_refused_since_s is None:
            self.quota_refused_since_s = now_s
        waited_s = now_s - self.quota_refused_since_s
        if waited_s <= self._quota_patience_s:
            return judgement
        message = f"no answer for {waited_s / 60:.0f} minutes: {judgement.error.message or ''}"
        error = RowError(judgement.error.kind, judgement.error.http_status, judgement.error.code, message)
        return Judgement(Verdict.PAUSE, error, retry_after_s=judgement.retry_after_s)

    def settled(self, status: Status, error: RowError | None) -> Stop | None:
        """A row is settled with this status; returns why the run must stop, if it must."""
        if error is not None and status is Status.ERROR:
            curable = error.kind == "bad_request" and not self._example_is_curable
            if self.example_error is None or curable:
                self.example_error, self._example_is_curable = error.text, error.kind == "bad_request"
        elif error is None and self._is_calm:
            return None
        return self._check_first_rows(status, error) or self._check_last_rows(error)

    def _check_first_rows(self, status: Status, error: RowError | None) -> Stop | None:
        """A stop if nearly all of the first rows are filtered, by a finish_reason too."""
        if not self._watch_first:
            return None
        self._settled += 1
        self._filtered += status is Status.FILTERED
        if self._settled < FIRST_ROWS:
            return None
        self._watch_first = False
        if self._filtered < NEARLY_ALL * FIRST_ROWS:
            return None
        self._watch_last = False
        return _stop(f"{self._filtered} of the first {FIRST_ROWS} rows were filtered", error)

    def _check_last_rows(self, error: RowError | None) -> Stop | None:
        """A stop if nearly all of the last rows were refused for their content: some outages use the same words.

        Rows blocked by a finish_reason do not count: a model answered those.
        """
        if self._retried:
            return None
        is_refused = error is not None and error.kind == CONTENT_POLICY
        if not is_refused and not self._refused_count:
            self._refused.append(False)
            is_full = len(self._refused) == FIRST_ROWS
            self._watch_last = self._watch_last or is_full
            self._is_calm = is_full and not self._watch_first
            return None
        self._is_calm = False
        if len(self._refused) == FIRST_ROWS:
            self._refused_count -= self._refused[0]
        self._refused.append(is_refused)
        self._refused_count += is_refused
        if len(self._refused) < FIRST_ROWS:
            return None
        count = self._refused_count
        if not self._watch_last:
            self._watch_last = count <= WELL_AGAIN * FIRST_ROWS
            return None
        if count < NEARLY_ALL * FIRST_ROWS:
            return None
        self._watch_last = False
        return _stop(f"{count} of the last {FIRST_ROWS} rows were filtered", error)


def _stop(what: str, error: RowError | None) -> Stop:
    example = "" if error is None else f" ({error.text})"
    return Stop(
        ExitCode.USAGE,
        f"{what}{example}: look at them. If that is right, run the same command again to send the rest. If it was an "
        "outage, run it later, and send the filtered rows again with --retry-failed --status filtered",
    )


def add_once(words: list[str], word: str) -> None:
    """Adds the word, shortened, unless it is there or the list is full: a server may invent one for each answer."""
    word = word[:MAX_REASON_CHARS]
    if word not in words and len(words) < MAX_REASONS:
        words.append(word)
