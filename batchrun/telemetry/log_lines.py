"""Lines for people as JSON, one object a line, with the figures as fields. PURE."""

import json
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal

from batchrun.records import Notice
from batchrun.report.cost_lines import bound_usd, cost_so_far, headline_usd
from batchrun.report.progress import line as progress_line
from batchrun.report.summary import failures
from batchrun.report.wording import plural
from batchrun.run_summary import Summary, stated

WARNING = "warning: "
ERROR = "Error: "
PROGRESS = "progress"
ENDED = "ended"


class LogLines:
    """Makes the lines of one process. Each has `time`, `level`, `event`, `message`, `job` and `run`, then its figures.

    `job` is null before the job is read, `run` (the run's id) before its input is checked.
    """

    def __init__(self) -> None:
        self.job: str | None = None
        self.run: str | None = None

    def note(self, line: str, at: datetime) -> str:
        """A line on the way, which may be a warning."""
        event, fields = (line.event, line.fields) if isinstance(line, Notice) else ("note", {})
        level = "warning" if line.startswith(WARNING) else "info"
        return self._line(at, level, event, line.removeprefix(WARNING), fields)

    def error(self, line: str, exit_code: int, at: datetime) -> str:
        """The last line of a command that failed."""
        return self._line(at, "error", "error", line.removeprefix(ERROR), {"exit_code": exit_code})

    def progress(self, summary: Summary, at: datetime) -> str:
        """The state of the run."""
        return self._line(at, "info", PROGRESS, progress_line(summary), figures(summary))

    def ended(self, summary: Summary, at: datetime) -> str:
        """How the start ended."""
        end = {"state": summary.state, "exit_code": summary.exit_code, "reason": summary.reason, "files": summary.files}
        level = "info" if not summary.exit_code else "warning"
        done = f"{summary.done:,} of {plural(summary.rows, 'row')} done"
        message = summary.reason or f"{summary.state}: {done}, {failures(summary):,} failed, {headline_usd(summary)}"
        return self._line(at, level, ENDED, message, {**end, **figures(summary)})

    def result(self, label: str, text: str, at: datetime) -> str:
        """A line of the account at the end, which is on stdout."""
        return self._line(at, "info", "result", text, {"label": label})

    def _line(self, at: datetime, level: str, event: str, message: str, fields: Mapping[str, object]) -> str:
        first = {"time": at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}
        of_line = {**first, "level": level, "event": event, "message": message, "job": self.job, "run": self.run}
        whole = {**of_line, **{name: value for name, value in fields.items() if name not in of_line}}
        # ASCII only: no terminal is steered by a model's text, and no reader stumbles over half a surrogate pair
        return json.dumps(_clean(whole), default=_plain)


def figures(summary: Summary) -> dict[str, object]:
    """The figures of a progress line, and the further ones that monitoring systems get."""
    live, totals = summary.live, summary.totals
    return {
        "rows": summary.rows,
        "done": summary.done,
        "pending": summary.pending,
        "failed": failures(summary),
        "retrying": 0 if summary.retrying is None else summary.retrying.rows,
        "by_status": summary.by_status,
        "prompt_tokens": sum(line.prompt_tokens for line in totals),
        "cached_tokens": stated(totals, "cached_tokens"),
        "completion_tokens": sum(line.completion_tokens for line in totals),
        "cost_usd": cost_so_far(summary),
        "possibly_billed": summary.possibly_billed_count,
        "possibly_billed_usd": bound_usd(summary),
        "tokens_per_second": summary.tokens_per_second,
        "requests_per_second": None if live is None else live.requests_per_second,
        "in_flight": None if live is None else live.in_flight,
        "refused_share": None if live is None else live.refused_share,
        "circuit": None if live is None else live.circuit,
        "limited_by": summary.limited_by,
        "eta": summary.eta,
        "by_deadline": summary.by_deadline,
        "elapsed_s": summary.elapsed_s,
    }


def _clean(value: object) -> object:
    """Without halves of surrogate pairs, which no JSON may hold."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case dict():
            return {_clean(name): _clean(each) for name, each in value.items()}
        case list() | tuple():
            return [_clean(each) for each in value]
    return value


def _plain(value: object) -> object:
    """Numbers for amounts of money, as programs that add lines up want them."""
    match value:
        case Decimal():
            return float(value)
        case datetime() | date():
            return value.isoformat()
    return str(_clean(str(value)))
