"""What the answers and settled rows of this start show that a person should know, or that stops the run. PURE.

Nothing here is kept per row.
"""

from collections import deque

from batchrun.errors import ExitCode
from batchrun.limits.admission import Stop
from batchrun.policy import CONTENT_POLICY, QUOTA, Judgement
from batchrun.records import RowError, Status, Verdict
from batchrun.response.finish_reasons import is_known

FIRST_ROWS = 40
"""So many first rows show whether nearly everything is filtered: a file may well begin with ten that are blocked."""

NEARLY_ALL = 0.95

WELL_AGAIN = 0.5
"""After a stop, and in a run that is resumed, the watch begins once no more than this share of the last rows is
refused: where a file simply is like that, one start only stops for it."""

MAX_REASONS = 20
MAX_REASON_CHARS = 100
"""A server that makes up a reason for each answer is not listened to for ever."""


class Signs:
    """`finish_reasons` are those seen that batchrun does not know, `unpriced_tiers` the service tiers that answers came
    from and no price is known of; `example_error` is why a row failed.

    That is the first row which was refused for its request, which a setting may cure, else the first that failed.
    """

    def __init__(self, *, quota_patience_s: float, resumed: bool, retried: bool = False) -> None:
        """A run that is `resumed` has had its first rows; a quota without success is waited for so many seconds.

        `retried`: settled rows are sent again, filtered ones perhaps, so many refusals in a row mean nothing.
        """
        self.finish_reasons: list[str] = []
        self.unpriced_tiers: list[str] = []
        self.example_error: str | None = None
        self._quota_patience_s = quota_patience_s
        self._refused_since_s: float | None = None
        self._example_is_curable = False
        self._settled = self._filtered = 0
        self._counts = not resumed
        self._watches = not resumed
        self._retried = retried
        self._refused: deque[bool] = deque(maxlen=FIRST_ROWS)
        self._refused_count = 0

    def judged(self, judgement: Judgement, now_s: float) -> Judgement:
        """The judgement, but for a quota that time should have lifted: without a success since, it pauses the run."""
        if judgement.verdict is Verdict.OK:
            self._refused_since_s = None
        if judgement.error is None or judgement.error.kind != QUOTA or judgement.verdict is not Verdict.SLOW:
            return judgement
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        waited_s = now_s - self._refused_since_s
        if waited_s <= self._quota_patience_s:
            return judgement
        message = f"no answer for {waited_s / 60:.0f} minutes: {judgement.error.message or ''}"
        error = RowError(judgement.error.kind, judgement.error.http_status, judgement.error.code, message)
        return Judgement(Verdict.PAUSE, error, retry_after_s=judgement.retry_after_s)

    def answered(self, finish_reason: str | None) -> None:
        """An answer ended so, or broke off."""
        if finish_reason is None or is_known(finish_reason):
            return
        _note(self.finish_reasons, finish_reason)

    def unpriced(self, service_tier: str | None) -> None:
        """An answer came from this tier, of which no price is known."""
        _note(self.unpriced_tiers, service_tier or "")

    def settled(self, status: Status, error: RowError | None) -> Stop | None:
        """A row ended so; why the run stops for it, if it does."""
        if status is Status.ERROR and error is not None:
            curable = error.kind == "bad_request" and not self._example_is_curable
            if self.example_error is None or curable:
                self.example_error, self._example_is_curable = error.text, error.kind == "bad_request"
        return self._first_rows(status, error) or self._last_rows(error)

    def _first_rows(self, status: Status, error: RowError | None) -> Stop | None:
        """A stop where nearly all of the first rows are filtered, by a finish_reason too."""
        if not self._counts:
            return None
        self._settled += 1
        self._filtered += status is Status.FILTERED
        if self._settled < FIRST_ROWS:
            return None
        self._counts = False
        if self._filtered < NEARLY_ALL * FIRST_ROWS:
            return None
        self._watches = False
        return _stop(f"{self._filtered} of the first {FIRST_ROWS} rows were filtered", error)

    def _last_rows(self, error: RowError | None) -> Stop | None:
        """A stop where nearly all of the last rows were refused for their content: an outage may be worded so.

        Rows that a finish_reason blocked do not count: a model has answered those.
        """
        if self._retried:
            return None
        now = error is not None and error.kind == CONTENT_POLICY
        if len(self._refused) == FIRST_ROWS:
            self._refused_count -= self._refused[0]
        self._refused.append(now)
        self._refused_count += now
        if len(self._refused) < FIRST_ROWS:
            return None
        refused = self._refused_count
        if not self._watches:
            self._watches = refused <= WELL_AGAIN * FIRST_ROWS
            return None
        if refused < NEARLY_ALL * FIRST_ROWS:
            return None
        self._watches = False
        return _stop(f"{refused} of the last {FIRST_ROWS} rows were filtered", error)


def _stop(what: str, error: RowError | None) -> Stop:
    said = "" if error is None else f" ({error.text})"
    return Stop(
        ExitCode.USAGE,
        f"{what}{said}: look at them; where that is right, the same command sends the rest; where it was an outage, "
        "run it later, and send them again with --retry-failed --status filtered",
    )


def _note(words: list[str], word: str) -> None:
    """A server's word, once."""
    word = word[:MAX_REASON_CHARS]
    if word not in words and len(words) < MAX_REASONS:
        words.append(word)
