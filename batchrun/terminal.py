"""Output on stderr for people while a command works: plain lines and a bar, or JSON lines. Sole importer of tqdm."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchrun import streams
from batchrun.errors import harmless

if TYPE_CHECKING:
    from datetime import datetime

    from batchrun.run_summary import Summary
    from batchrun.telemetry.log_lines import LogLines

LOG_FORMAT = "--log-format"
LOG_FORMAT_ENV = "BATCHRUN_LOG_FORMAT"


class _Format:
    json: "LogLines | None" = None


def choose_format(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    """Lines are plain or JSON from now on. Before the command line is read: its errors are lines as well."""
    chosen = environ.get(LOG_FORMAT_ENV, "")
    for word, value in zip(arguments, [*arguments[1:], ""], strict=False):
        if word == LOG_FORMAT:
            chosen = value
        elif word.startswith(f"{LOG_FORMAT}="):
            chosen = word.partition("=")[2]
    _Format.json = None
    if chosen == "json":
        from batchrun.telemetry.log_lines import LogLines

        _Format.json = LogLines()


def is_json() -> bool:
    return _Format.json is not None


def set_job(job: str) -> None:
    """The lines are about this job from now on."""
    if _Format.json is not None:
        _Format.json.job = job


def note(line: str) -> None:
    """Writes a line for people. Text of a model in it can't steer the terminal."""
    if _Format.json is not None:
        write_json(_Format.json.note(line, _now()))
        return
    with streams.lenient_stderr():
        if "tqdm" not in sys.modules:  # no bar is shown
            print(harmless(line), file=sys.stderr)
            return
        from tqdm import tqdm

        tqdm.write(harmless(line), file=sys.stderr)


def write_json(line: str) -> None:
    """Writes a line that is JSON already."""
    with streams.lenient_stderr():
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def error(line: str, exit_code: int) -> None:
    """Writes the last line of a command that failed."""
    if _Format.json is not None:
        write_json(_Format.json.error(line, exit_code, _now()))
    else:
        note(line)


def result(line: str) -> str:
    """A line of the account at the end as it goes to stdout, `label        text`."""
    if _Format.json is None:
        return harmless(line)
    from batchrun.report.closing import LABEL_WIDTH

    return _Format.json.result(line[:LABEL_WIDTH].strip(), line[LABEL_WIDTH:], _now())


def ended(summary: "Summary") -> None:
    """The end of a start as a JSON line; without JSON the closing lines report it."""
    if _Format.json is not None:
        _Format.json.run = summary.run_id or None
        write_json(_Format.json.ended(summary, _now()))


def _now() -> "datetime":
    from datetime import UTC, datetime

    return datetime.now(UTC)


class Progress:
    """A bar on a terminal; elsewhere a line every 30 seconds, without carriage returns. A context manager."""

    LINE_EVERY_S = 30.0

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown_s = 0.0
        self._terminal = sys.stderr.isatty() and _Format.json is None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            with streams.lenient_stderr():
                self._bar.close()

    def checked(self, rows: int) -> None:
        """Shows how many rows the input check has read."""
        if self._terminal:
            from batchrun.report.wording import plural

            with streams.lenient_stderr():
                if self._bar is None:
                    self._bar = _bar(bar_format="{desc}")
                self._bar.set_description_str(f"checking the input: {plural(rows, 'row')} so far")

    def show(self, summary: "Summary") -> None:
        """Shows the state of the run."""
        from batchrun.report import progress

        if _Format.json is not None:
            _Format.json.job, _Format.json.run = summary.job, summary.run_id or None
        if summary.state == "checking":
            return
        if self._terminal:
            with streams.lenient_stderr():
                self._show_bar(summary)
        elif summary.elapsed_s - self._shown_s >= self.LINE_EVERY_S:
            self._shown_s = summary.elapsed_s
            if _Format.json is not None:
                write_json(_Format.json.progress(summary, _now()))
            else:
                note(progress.line(summary))

    def _show_bar(self, summary: "Summary") -> None:
        from batchrun.report import progress

        if self._bar is None or self._bar.total is None:
            if self._bar is not None:
                self._bar.close()
            self._bar = _bar(total=summary.rows)
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
        left, right, bar = progress.around_bar(summary, columns)
        self._bar.bar_format = _escaped(left) + ("|{bar}| " if bar else " " * bool(left)) + _escaped(right)
        self._bar.n = summary.done
        self._bar.refresh()


def _bar(**options: Any) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # its thread would write to a terminal that is gone, where no one can catch the error
    return tqdm(dynamic_ncols=True, leave=False, **options)


def _escaped(text: str) -> str:
    """The text as a format string for itself: a job's name may hold braces."""
    return harmless(text).replace("{", "{{").replace("}", "}}")
