"""The lines of `batchrun status` for one run."""

from collections.abc import Iterator
from datetime import UTC, datetime

from batchrun.limits import deadline
from batchrun.report.closing import pace
from batchrun.report.cost_lines import cost_lines, estimate_in_words
from batchrun.report.limit_lines import limits_in_words, retrying_in_words
from batchrun.report.run_state import RunState
from batchrun.report.wording import age_in_words
from batchrun.run_summary import Summary
from batchrun.store.rundir import RunDirectory


def lines(directory: RunDirectory, found: RunState) -> Iterator[str]:
    """The state of the run; if a process works on it, also its rate, ETA and limits."""
    summary = found.summary
    state = "died; run the same command again to resume" if found.died else summary.state
    yield f"{summary.job}  {state}" + (f" (pid {summary.pid} on {summary.host})" if found.working else "")
    done = summary.done
    counts = ", ".join(f"{rows:,} {status}" for status, rows in summary.by_status.items())
    if summary.rows:
        yield f"rows    {done:,} of {summary.rows:,} done, {summary.pending:,} pending" + (counts and f": {counts}")
    else:  # the input has not been read to its end
        yield "rows    not counted yet"
    yield f"cost    {'; '.join(cost_lines(summary))}"
    if (estimated := estimate_in_words(summary)) is not None:
        yield f"estimate {estimated}"
    if found.working:
        if summary.pending and summary.rows_per_minute:
            end = "" if summary.eta is None else f"; done at {_clock(summary.eta, summary)}"
            yield f"rate    {pace(summary)}, limited by {summary.limited_by}{end}"
        if summary.deadline is not None:
            share = "" if summary.by_deadline is None else f": {int(summary.by_deadline * 100)} % of the rows by then"
            yield f"until   {_clock(summary.deadline, summary)}{share}"
        if summary.limits is not None:
            yield f"limits  {limits_in_words(summary.limits)}"
        if summary.retrying is not None:
            yield f"retries {retrying_in_words(summary.retrying)}"
    if found.problem is not None:
        yield f"note    the checkpoint can't be read, so this may be out of date: {found.problem}"
    if summary.reason:
        yield f"reason  {summary.reason}"
    if not summary.complete and directory.partial.exists():
        at = datetime.fromtimestamp(directory.partial.stat().st_mtime, UTC).astimezone()
        yield f"rows so far, of {at:%Y-%m-%d %H:%M:%S}: {directory.partial}"
    age_s = (datetime.now(UTC) - summary.updated_at).total_seconds()
    yield f"as of   {summary.updated_at.astimezone():%Y-%m-%d %H:%M:%S}, {age_in_words(age_s)} ago"


def _clock(at: datetime, summary: Summary) -> str:
    return deadline.in_words(at.astimezone().replace(microsecond=0), summary.updated_at)
