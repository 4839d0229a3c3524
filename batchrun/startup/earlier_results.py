"""Earlier results whose answers may be reused: what `--reuse` and `input.reuse_from` name, as Parquet files."""

import glob
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from batchrun.errors import InputError, quoted, writable
from batchrun.job.job import Job
from batchrun.store import result_files, run_path
from batchrun.store.origins import OldFile
from batchrun.store.rundir import RunDirectory

LATEST = "latest"
"""The newest other run of the job's `output.path` that has answers."""


class EarlierResult(msgspec.Struct, frozen=True):
    """The files of one run, or of one folder that another program wrote."""

    name: str
    files: tuple[OldFile, ...]


def sources(job: Job) -> tuple[str, ...]:
    """The results that the job reuses, in its order."""
    named = job.input.reuse_from
    return (named,) if isinstance(named, str) else tuple(named)


def find_earlier(job: Job, own: Path, note: Callable[[str], None] = lambda line: None) -> list[EarlierResult]:
    """The earlier results in the order in which they are searched: as named, and of a pattern the last name first.

    `own` is the run's own directory, which is left out. `note` gets a line for each source that has nothing.

    Raises:
        InputError: a path without a pattern does not exist, or holds no answers.
    """
    found: dict[str, EarlierResult] = {}
    for source in sources(job):
        before = len(found)
        for path in _paths(source, job):
            for result in _results(path):
                if not Path(result.name).resolve().is_relative_to(own.resolve()):
                    found.setdefault(str(Path(result.name).resolve()), result)
        if len(found) == before:
            if source != LATEST and not glob.has_magic(source) and "{" not in source:
                _raise_nothing_there(source, own)
            place = f"in {run_path.pattern_of(job.output)}" if source == LATEST else "there"  # -o replaces output.path
            note(f"reuse: {source}: no earlier answers {place} yet")
    return list(found.values())


def _raise_nothing_there(source: str, own: Path) -> NoReturn:
    path = Path(source)
    if not path.exists():
        raise InputError(f"reuse: {source}: there is no such file or directory")
    if path.resolve().is_relative_to(own.resolve()):
        raise InputError(f"reuse: {source}: is the run itself; name earlier results")
    if RunDirectory(path).checkpoint.exists():
        raise InputError(
            f"reuse: {source}: the run is not complete, and its answers so far are in no file; write them with "
            f"batchrun export {quoted(source)}"
        )
    raise InputError(f"reuse: {source}: no Parquet file there")


def _paths(source: str, job: Job) -> Iterator[Path]:
    if source == LATEST:
        # the newest run that has answers, and the one before: the newest may be the run itself
        runs = run_path.directories(job)
        yield from itertools.islice((run for run in runs if any(_results(run))), 2)
        return
    pattern = source.replace("{job}", glob.escape(job.name)).replace("{date}", "*")
    if glob.has_magic(pattern):
        yield from map(Path, sorted(glob.glob(pattern, recursive=True), reverse=True))  # noqa: PTH207
    elif Path(source).exists():
        yield Path(source)


def _results(path: Path) -> Iterator[EarlierResult]:
    """The results at a path: a file, a run or a folder of Parquet files; in a folder of those, the last name first."""
    if path.is_file():
        if path.suffix == ".parquet" or not glob.has_magic(str(path)):
            yield EarlierResult(str(path), tuple(_old_file(file, path) for file in result_files.of(path)))
        return
    files = result_files.of(path)
    if not files and not RunDirectory(path).checkpoint.exists():
        children = [child for child in path.iterdir() if not child.name.startswith((".", "_"))]
        files = sorted(child for child in children if child.suffix == ".parquet" and child.is_file())
        for child in sorted(children, reverse=True):
            if child.is_dir():
                yield from _results(child)
    if files := [file for file in files if file.exists()]:
        yield EarlierResult(str(path), tuple(_old_file(file, path) for file in files))


def _old_file(file: Path, named: Path) -> OldFile:
    status = file.stat()
    return OldFile(os.fsencode(file), writable(str(named)), status.st_size, status.st_mtime_ns)
