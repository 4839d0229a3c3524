"""The run directory: its path by `{job}` and `{date}`, its files, and the lock that one process holds."""

import contextlib
import fcntl
import glob
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from batchrun import durable
from batchrun.durable import disk_errors
from batchrun.errors import JobError, RunLockedError
from batchrun.job.settings import Output
from batchrun.storage import urls
from batchrun.storage.urls import Url

NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "fuse.sshfs", "ceph", "lustre"})
"""Their locks and fsync are not what SQLite needs (sqlite.org, "How To Corrupt", section 2.1)."""

MOUNTINFO = Path("/proc/self/mountinfo")
"""The mounted file systems (proc_pid_mountinfo(5)); the file exists on Linux only."""

LOCK_RETRY_S = 0.05

RESERVE_BYTES = 16_000_000
"""Freed when the disk is full: space for the answers that are in flight then."""


class RunDirectory:
    """The paths of one run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.completions = path / "completions.parquet"
        self.lines = path / "completions.jsonl"  # format = "jsonl"; with .gz or .zst behind it
        self.completions_folder = path / "completions"  # layout = "parts"
        self.staging = path / "completions.tmp"  # that folder while it is made
        self.partial = path / "completions.partial.parquet"  # of a run that is not complete
        self.usage = path / "usage.parquet"
        self.summary = path / "summary.json"
        self.checkpoint = path / "checkpoint.db"
        self.inflight = path / "inflight.bin"
        self.reserve = path / "reserve.bin"
        self.parts = path / "parts"
        self.rejects = path / "rejects.jsonl"
        self.spool = path / "input.jsonl"
        self.given = path / "input.given.jsonl"  # rows that differ from those, until they are accepted
        self.spool_before = path / "input.before.jsonl"
        self.log = path / "run.log"
        self.control = path / "control.json"
        self.writer = path / "writer"  # our name among the writers of an object store

    def input_of(self, chunk: int, layout: int = 0) -> Path:
        """The stored input of an open chunk; `layout` counts how often a changed input or job was accepted."""
        return self.parts / (f"{chunk:06d}.{layout}.input.arrow" if layout else f"{chunk:06d}.input.arrow")

    def part_of(self, chunk: int, generation: int) -> Path:
        """The part of a sealed chunk."""
        return self.parts / f"{chunk:06d}.g{generation}.parquet"

    def images_of(self, layout: int = 0) -> Path:
        """The digests of the rows' images as the check pass saw them."""
        return self.path / (f"images.{layout}.bin" if layout else "images.bin")

    def origins_of(self, layout: int = 0) -> Path:
        """The file that says which rows take an earlier answer, or that of an equal row."""
        return self.path / (f"origins.{layout}.bin" if layout else "origins.bin")

    def create(self, mountinfo: Path = MOUNTINFO) -> None:
        """Creates the directory, readable by its owner alone, on a local file system.

        Raises:
            JobError: a file is in the way, it can't be written, or it is on a network file system.
        """
        try:
            for directory in (self.path, self.parts):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise JobError(f"{self.path}: a file is in the way; choose another directory with -o") from error
        except OSError as error:
            raise JobError(
                f"{self.path}: can't make the run directory: {error.strerror}; choose another with -o"
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise JobError(f"{self.path}: can't be written; choose another directory with -o")
        _require_local(self.path, self.path, mountinfo)

    def require_possible(self, mountinfo: Path = MOUNTINFO) -> None:
        """Checks whether `create` would succeed, and creates nothing.

        Raises:
            JobError: as `create`.
        """
        there = self.path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir() or (self.parts.exists() and not self.parts.is_dir()):
            raise JobError(f"{self.path}: a file is in the way; choose another directory with -o")
        if not os.access(there, os.W_OK | os.X_OK):
            raise JobError(f"{self.path}: can't be written; choose another directory with -o")
        _require_local(self.path, there, mountinfo)

    def try_out(self) -> None:
        """Writes a small file where the directory is or will be, and removes it.

        Raises:
            DiskError: it could not.
        """
        with disk_errors(self.path):
            durable.try_out(self.path)

    def reserve_room(self) -> None:
        """Allocates the reserve that is freed when the disk is full."""
        with contextlib.suppress(OSError):  # without space even for that, the run works without it
            descriptor = os.open(self.reserve, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)

    def free_room(self) -> bool:
        """Frees the reserve; False if there was none."""
        try:
            self.reserve.unlink()
        except OSError:
            return False
        return True

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Locks the directory for this process until the block ends.

        Raises:
            RunLockedError: another process has locked it; the message names pid, host and since when.
        """
        # flock on the directory itself: the kernel releases it when the process dies, even by kill -9
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            with disk_errors(self.path):
                has_lock = _flock(descriptor)
                if not has_lock:
                    time.sleep(LOCK_RETRY_S)  # `batchrun status` holds the lock for microseconds
                    has_lock = _flock(descriptor)
            if not has_lock:
                raise RunLockedError(f"{self.path}: another run works here ({self._holder()}); nothing was sent")
            yield
        finally:
            os.close(descriptor)

    def locked(self) -> bool:
        """True while a process holds the lock."""
        try:
            with self.lock():
                return False
        except RunLockedError:
            return True

    def _holder(self) -> str:
        summary = self.read_summary() or {}
        pid, host, since = summary.get("pid"), summary.get("host"), summary.get("started_at")
        return f"pid {pid} on {host}, since {since}" if pid else "it has just started"

    def read_summary(self) -> dict[str, object] | None:
        """The content of summary.json; None if it is missing or can't be read."""
        try:
            summary = msgspec.json.decode(self.summary.read_bytes())
        except (OSError, msgspec.DecodeError):
            return None
        return summary if isinstance(summary, dict) else None


def _require_local(path: Path, there: Path, mountinfo: Path) -> None:
    if (kind := file_system(there, mountinfo)) in NETWORK_FILE_SYSTEMS:
        raise JobError(f"{path}: is on a network file system ({kind}); choose a local directory with -o")


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def file_system(path: Path, mountinfo: Path = MOUNTINFO) -> str:
    """The type of the file system of `path`, as the kernel names it; "" if it does not say."""
    try:
        lines = mountinfo.read_text().splitlines()
    except OSError:
        return ""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return ""


STATE_DIR = "~/.local/state/batchrun"
"""Where the directories of runs are whose result goes to an object store."""


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


def _state_of(output: Output) -> Path:
    root = Path(output.state_dir or STATE_DIR).expanduser()
    return root / urls.parse(output.path, "output.path").scheme


_DATE = r"\d{4}-\d{2}-\d{2}(?:-\d+)?"


def place(
    pattern: str,
    job: str,
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
    fixed = _of_job(pattern, job)
    if unknown := re.search(r"\{(?!date\})[^}]*\}", fixed):
        raise JobError(f"output.path: {unknown[0]} is not known; {{job}} and {{date}} are")
    wanted = date or now.date().isoformat()
    path = Path(fixed.replace("{date}", wanted))
    if new:
        return _unused(fixed, wanted, path, taken), None
    if date is None and "{date}" in fixed and (newest := _newest(fixed)) is not None and newest[0] != wanted:
        summary = RunDirectory(newest[1]).read_summary()
        if summary is not None and not summary.get("complete") and summary.get("job") == job:
            return newest[1], newest[0]
    started = RunDirectory(path).checkpoint.exists()
    if date is None and "{date}" in fixed and not started and (there := elsewhere()) is not None:
        return there
    return path, None


def logical_date(date: str | None, now: datetime) -> str:
    """What `{date}` is in `input.path`: the date that was named or is resumed, without the number that --new gives."""
    return now.date().isoformat() if date is None else date[:10]


def _of_job(pattern: str, job: str) -> str:
    """The pattern with the job's name, in UTF-8 whatever the locale's encoding (with LANG=C it is ASCII)."""
    return os.fsdecode(str(Path(pattern.replace("{job}", job))).encode("utf-8", "surrogateescape"))


def dates_among(pattern: str, job: str, names: Callable[[str], Iterable[str]]) -> list[tuple[Path, str]]:
    """The directories, with their dates, that the pattern may mean; the last date first. `names` lists a folder: the
    one that the pattern's first dated name is in.
    """
    fixed = _of_job(pattern, job)
    above, _, start = fixed.partition("{date}")[0].rpartition("/")
    end = fixed.partition("{date}")[2].partition("/")[0]
    expression = re.compile(f"{re.escape(start)}({_DATE}){re.escape(end)}")
    dates = [match[1] for name in names(above) if (match := expression.fullmatch(name))]
    return [(Path(fixed.replace("{date}", date)), date) for date in sorted(dates, key=_by_date, reverse=True)]


def unfinished(pattern: str, job: str, chosen: Path) -> list[tuple[str, Path]]:
    """The dates and directories of this job's other runs that stopped before they were complete, oldest first.

    Only those of the pattern, without the `chosen` one and any that a process works on.
    """
    fixed = _of_job(pattern, job)
    if "{date}" not in fixed:
        return []
    return [
        (date, path)
        for date, path in sorted(_dated(fixed), key=lambda pair: _by_date(pair[0]))
        if path != chosen and _stopped(RunDirectory(path), job)
    ]


def _stopped(directory: RunDirectory, job: str) -> bool:
    try:
        content = directory.summary.read_bytes()
    except OSError:
        return False
    if b'"complete": true' in content:  # quick, since there may be thousands of complete runs
        return False
    summary = directory.read_summary() or {}
    return summary.get("complete") is False and summary.get("job") == job and not directory.locked()


def _unused(pattern: str, date: str, path: Path, taken: Callable[[Path], bool]) -> Path:
    if "{date}" not in pattern and taken(path):
        raise JobError(f"--new: {path} exists and output.path has no {{date}}; name another with -o")
    number = 1
    while taken(path):
        number += 1
        path = Path(pattern.replace("{date}", f"{date}-{number}"))
    return path


def dated(pattern: str, job: str) -> list[Path]:
    """The directories that the job's runs may be in, the last date first."""
    fixed = _of_job(pattern, job)
    if "{date}" not in fixed:
        return [Path(fixed)]
    return [path for _, path in sorted(_dated(fixed), key=lambda pair: _by_date(pair[0]), reverse=True)]


def _newest(pattern: str) -> tuple[str, Path] | None:
    """The last date that fits the pattern, and its directory."""
    return max(_dated(pattern), key=lambda pair: _by_date(pair[0]), default=None)


def _dated(pattern: str) -> list[tuple[str, Path]]:
    """The dates and directories that fit the pattern."""
    parts = pattern.split("{date}")
    first, *others = map(re.escape, parts)
    expression = re.compile("(?P=date)".join([f"{first}(?P<date>{_DATE}){others[0]}", *others[1:]]))
    names = glob.glob("*".join(map(glob.escape, parts)))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    return [(match["date"], Path(name)) for name in names if (match := expression.fullmatch(name))]


def _is_date(text: str) -> bool:
    """True for a day of the calendar, with or without a number by --new."""
    try:
        return re.fullmatch(_DATE, text) is not None and bool(datetime.fromisoformat(text[:10]))
    except ValueError:
        return False


def _by_date(date: str) -> tuple[str, int]:
    return date[:10], int(date[11:] or 1)
