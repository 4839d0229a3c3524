"""Finds the files that hold the rows of a result, in any layout, for everything that reads results."""

import re
from pathlib import Path

import msgspec

from batchrun.errors import InputError
from batchrun.store.result_folder import MANIFEST
from batchrun.store.rundir import RunDirectory
from batchrun.tables import json_lines

_PART = re.compile(r"(\d+)\.g(\d+)\.parquet")


def of(place: Path) -> list[Path]:
    """The Parquet files that hold the rows, in the order of the rows: of a run directory, of a folder of the result
    that was moved, or the file itself. [] if there are none. An incomplete run has some after `batchrun export`.

    Raises:
        InputError: the file is JSON lines, or the manifest of a moved folder can't be read.
    """
    if place.name == MANIFEST:
        place = place.parent
    if place.is_file():
        if json_lines.packing_of(place) is not None:
            raise InputError(f"{place}: JSON lines, which hold no types; name the run's directory, or a Parquet file")
        return [place]
    run = RunDirectory(place)
    if run.completions.exists():
        return [run.completions]
    if parts := sorted(run.completions_folder.glob("*.parquet")):
        return parts
    if (run.completions_folder / MANIFEST).exists() or _lines_of(run) is not None:
        return _kept(run)
    if (place / MANIFEST).exists():
        return _named(place)
    return [run.partial] if run.partial.exists() else []


def shown(run: RunDirectory) -> Path:
    """The result of a complete run, as users know it."""
    whole = run.completions if run.completions.exists() else _lines_of(run)
    return whole or run.completions_folder


def lines_in(run: RunDirectory, format_: str) -> Path:
    """Where a result in JSON lines is: completions.jsonl, completions.jsonl.gz or completions.jsonl.zst."""
    return run.lines.with_suffix(f".{format_}")


def _lines_of(run: RunDirectory) -> Path | None:
    paths = (lines_in(run, format_) for format_ in ("jsonl", "jsonl.gz", "jsonl.zst"))
    return next((path for path in paths if path.exists()), None)


def _kept(run: RunDirectory) -> list[Path]:
    """The parts that a run keeps: of each chunk the last one, should a retry be under way."""
    last: dict[int, tuple[int, Path]] = {}
    for path in run.parts.iterdir():
        if (match := _PART.fullmatch(path.name)) is not None:
            chunk, generation = int(match[1]), int(match[2])
            last[chunk] = max(last.get(chunk, (0, path)), (generation, path))
    return [path for _, (_, path) in sorted(last.items())]


class _Entry(msgspec.Struct):
    name: str


class _Manifest(msgspec.Struct):
    files: list[_Entry]


def _named(folder: Path) -> list[Path]:
    """The files that the manifest of a moved folder names."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=_Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise InputError(f"{folder / MANIFEST}: can't be read: {error}") from error
    return [folder / file.name for file in manifest.files]
