"""Which directory a run has: `output.path` of its job, with `{job}` and `{date}` filled in."""

import glob
import os
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.job.settings import Output
from batchrun.storage import urls
from batchrun.storage.urls import Url
from batchrun.store.rundir import RunDirectory

STATE_DIR = "~/.local/state/batchrun"
"""Where the directories of runs are whose result goes to an object store."""

_DATE = r"\d{4}-\d{2}-\d{2}(?:-\d+)?"


def pattern_of(output: Output) -> str:
    """The pattern of the run's own directory: `output.path`, or for a URL its path below `output.state_dir`.

    Raises:
        JobError: the URL is invalid, or there is a `state_dir` and no URL.
    """
    if not urls.is_url(output.path):
        if output.state_dir is not None:
            raise JobError("output.state_dir: is for a run whose output.path is a URL such as s3://bucket/folder")
        return output.path
    return str(_state_of(output) / urls.parse(output.path, "output.path").path.rstrip("/"))


def published_at(output: Output, directory: Path) -> Url | None:
    """Where the result of the run in the directory is published; None if the directory itself is the place."""
    if not urls.is_url(output.path):
        return None
    return urls.parse(output.path, "output.path").at(directory.relative_to(_state_of(output)).as_posix())


def choose(
    job: Job,
    *,
    date: str | None,
    now: datetime,
    new: bool,
    taken: Callable[[Path], bool] = Path.exists,
    elsewhere: Callable[[], tuple[Path, str] | None] = lambda: None,
) -> tuple[Path, str | None]:
    """The run directory for this start, and the date of the earlier unfinished run that it resumes, if it does.

    `{date}` is `date` if given; else that of the pattern's newest directory, if its run is unfinished; else the local
    date. With `new` the directory is a new one, such as `2026-11-22-2` beside `2026-11-22`, that is
    not `taken`. A machine without today's directory resumes an unfinished run that `elsewhere` names.
    """
    if date is not None and not _is_date(date):
        raise JobError(f"--date {date}: expected YYYY-MM-DD")
    pattern = _pattern(job)
    if unknown := re.search(r"\{(?!date\})[^}]*\}", pattern):
        raise JobError(f"output.path: {unknown[0]} is not known; {{job}} and {{date}} are")
    wanted = date or now.date().isoformat()
    path = Path(pattern.replace("{date}", wanted))
    if new:
        return _unused(pattern, wanted, path, taken), None
    if date is not None or "{date}" not in pattern:
        return path, None
    for newest, directory in _dated(pattern)[:1]:
        summary = RunDirectory(directory).read_summary()
        is_own = summary is not None and summary.get("job") == job.name
        if newest != wanted and summary is not None and is_own and not summary.get("complete"):
            return directory, newest
    if not RunDirectory(path).checkpoint.exists() and (there := elsewhere()) is not None:
        return there
    return path, None


def logical_date(date: str | None, now: datetime) -> str:
    """What `{date}` is in `input.path`: the date that was named or is resumed, without the number that --new gives."""
    return now.date().isoformat() if date is None else date[:10]


def directories(job: Job) -> list[Path]:
    """The directories that the job's runs may be in, the last date first."""
    pattern = _pattern(job)
    return [path for _, path in _dated(pattern)] if "{date}" in pattern else [Path(pattern)]


def unfinished(job: Job, chosen: Path) -> list[tuple[str, Path]]:
    """The dates and directories of this job's other runs that stopped before they were complete, oldest first.

    Only those of the pattern, without the `chosen` one and any that a process works on.
    """
    pattern = _pattern(job)
    dated = reversed(_dated(pattern)) if "{date}" in pattern else ()
    return [(date, path) for date, path in dated if path != chosen and _has_stopped(RunDirectory(path), job.name)]


def dates_among(job: Job, names: Callable[[str], Iterable[str]]) -> list[tuple[Path, str]]:
    """The directories, with their dates, that the pattern may mean; the last date first. `names` lists a folder: the
    one that the pattern's first dated name is in.
    """
    pattern = _pattern(job)
    above, _, start = pattern.partition("{date}")[0].rpartition("/")
    end = pattern.partition("{date}")[2].partition("/")[0]
    expression = re.compile(f"{re.escape(start)}({_DATE}){re.escape(end)}")
    dates = [match[1] for name in names(above) if (match := expression.fullmatch(name))]
    return [(Path(pattern.replace("{date}", date)), date) for date in sorted(dates, key=_by_date, reverse=True)]


def _state_of(output: Output) -> Path:
    """The folder of the directories whose results go to stores of this scheme."""
    root = Path(output.state_dir or STATE_DIR).expanduser()
    return root / urls.parse(output.path, "output.path").scheme


def _pattern(job: Job) -> str:
    """The pattern with the job's name, in UTF-8 whatever the locale's encoding (with LANG=C it is ASCII)."""
    named = pattern_of(job.output).replace("{job}", job.name)
    return os.fsdecode(str(Path(named)).encode("utf-8", "surrogateescape"))


def _has_stopped(directory: RunDirectory, job: str) -> bool:
    """Whether the directory has an incomplete run of the job that no process works on."""
    try:
        content = directory.summary.read_bytes()
    except OSError:
        return False
    if b'"complete": true' in content:  # quick, since there may be thousands of complete runs
        return False
    summary = directory.read_summary() or {}
    return summary.get("complete") is False and summary.get("job") == job and not directory.locked()


def _unused(pattern: str, date: str, path: Path, taken: Callable[[Path], bool]) -> Path:
    """The first directory of the date that is not taken: `path`, or one with a number."""
    if "{date}" not in pattern and taken(path):
        raise JobError(f"--new: {path} exists and output.path has no {{date}}; name another with -o")
    number = 1
    while taken(path):
        number += 1
        path = Path(pattern.replace("{date}", f"{date}-{number}"))
    return path


def _dated(pattern: str) -> list[tuple[str, Path]]:
    """The dates and directories that fit the pattern, the last date first."""
    parts = pattern.split("{date}")
    first, *others = map(re.escape, parts)
    expression = re.compile("(?P=date)".join([f"{first}(?P<date>{_DATE}){others[0]}", *others[1:]]))
    names = glob.glob("*".join(map(glob.escape, parts)))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    found = [(match["date"], Path(name)) for name in names if (match := expression.fullmatch(name))]
    return sorted(found, key=lambda pair: _by_date(pair[0]), reverse=True)


def _is_date(text: str) -> bool:
    """True for a day of the calendar, with or without a number by --new."""
    try:
        return re.fullmatch(_DATE, text) is not None and bool(datetime.fromisoformat(text[:10]))
    except ValueError:
        return False


def _by_date(date: str) -> tuple[str, int]:
    """The order of dates: the tenth run of a day comes after its second."""
    return date[:10], int(date[11:] or 1)
