"""Finds the files that an input path means: a file, a directory, a glob, or a URL of them."""

import glob
import os
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path, PurePosixPath

from batchrun.errors import InputError
from batchrun.source import partitions, unsupported
from batchrun.source.content import Format, format_of, reading
from batchrun.source.partitions import Filters
from batchrun.storage import objects, urls
from batchrun.storage.access import ENVIRONMENT, Access, connect
from batchrun.storage.objects import InputFile, RemoteFile

_ALL: Filters = {}


def find_files(path: str, filters: Filters = _ALL, access: Access = ENVIRONMENT) -> tuple[InputFile, ...]:
    """The input files that `path` means, sorted by path string. It is a file, a directory or a glob, or a URL of one.
    Of folders named `key=value`, only those that match the `filters` are read.

    A directory means its own files and those in its folders named `key=value`, at every depth. In directories and
    globs, names that start with "." or "_" are left out, files and folders both, as Spark and Hive do (`_SUCCESS`,
    `_temporary`), and so are checksums (`.crc`), Hadoop's markers of folders (`_$folder$`) and what editors leave
    (`~`, `.swp`). A link to a folder above it is not followed.

    Raises:
        InputError: nothing matches; a filter names an unknown key; a file is unreadable, not a regular file, or in
            another format than the first; the folder is one of a table format (Delta, Iceberg, Hudi).
    """
    files = tuple(sorted(_remote_matches(path, access) if urls.is_url(path) else _matches(path), key=str))
    if not urls.is_url(path) and not Path(path).is_file():
        for folder in sorted({file.parent for file in files if isinstance(file, Path)} or {Path(path)}):
            unsupported.refuse_table(folder)
    if not files:
        raise InputError(
            f"{path}: no input file there{_folders_in(path)}; name a JSONL or Parquet file, CSV, a directory, or a glob"
        )
    if filters:
        files = partitions.chosen(files, filters, path)
    formats: dict[Format, InputFile] = {}
    for file in files:
        formats.setdefault(format_of(file), file)
    if len(formats) > 1:
        (one, first), (_, second) = sorted(formats.items(), reverse=True)[:2]
        raise InputError(
            f"{first} is {_NAMES[one]} but {second} is not; "
            f"an input has one format: name its files with a glob such as 'data/*.{one}'"
        )
    return files


def file_at(path: str) -> InputFile:
    """The file of that path or URL, which need not exist. A store is reached as the environment says."""
    if not urls.is_url(path):
        return Path(path)
    url = urls.parse(path)
    return RemoteFile(url, *connect(url))


_NAMES: dict[Format, str] = {"jsonl": "JSON lines", "parquet": "Parquet", "csv": "CSV"}


def _remote_matches(text: str, access: Access) -> list[InputFile]:
    """As `_matches`, in an object store."""
    found, named = objects.find_remote(text, access), urls.parse(text).path.rstrip("/")
    if [file.url.path for file in found] == [named]:
        return list(found)
    pattern = urls.is_pattern(named)
    above = len(PurePosixPath(urls.fixed_part(named)).parts)
    below = [(file, PurePosixPath(file.url.path).parts[above:]) for file in found]
    return [
        file
        for file, parts in below
        if not parts or (not any(map(_is_left_out, parts)) and (pattern or all("=" in folder for folder in parts[:-1])))
    ]


def _matches(path: str) -> list[Path]:
    named = Path(path)
    if named.is_dir():
        return list(_files_below(named, _above(named)))
    if os.path.lexists(path):
        return [named]
    fixed = len(Path(glob.escape(path.partition("*")[0])).parts)  # a hidden folder that the path names is read
    found = [Path(match) for match in _glob(path) if not Path(match).is_dir()]
    return [file for file in found if not any(map(_is_left_out, file.parts[min(fixed, len(file.parts) - 1) :]))]


def _glob(path: str) -> Iterable[str]:
    """Files that the pattern matches. `**` follows no link to a folder above it; `glob` would follow it forty times."""
    above, stars, rest = path.partition("**")
    if not stars or (above and not above.endswith("/")) or (rest and not rest.startswith("/")):
        return glob.glob(path)  # noqa: PTH207
    bases = glob.glob(above) if above else ["."]  # noqa: PTH207
    folders = chain.from_iterable(_folders(Path(base), _above(Path(base))) for base in bases)
    within = rest.lstrip("/") or "*"
    return dict.fromkeys(chain.from_iterable(_glob(f"{glob.escape(str(folder))}/{within}") for folder in folders))


def _above(folder: Path) -> frozenset[str]:
    """The real paths of the folders that hold this one."""
    return frozenset(map(str, Path(os.path.realpath(folder)).parents))


def _folders(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The folder and those below it. `above`: the real paths of those that lead to it."""
    real = os.path.realpath(folder)
    if real in above or not folder.is_dir():
        return
    yield folder
    with reading(folder):
        children = [child for child in folder.iterdir() if child.is_dir() and not _is_left_out(child.name)]
    for child in children:
        yield from _folders(child, above | {real})


def _files_below(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The files of a directory, and of its folders that are named `key=value`. `above`: as in `_folders`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with reading(folder):
        children = list(folder.iterdir())
    for child in children:
        if _is_left_out(child.name):
            continue
        if not child.is_dir():
            yield child
        elif "=" in child.name:
            yield from _files_below(child, above | {real})


def _is_left_out(name: str) -> bool:
    return name.startswith((".", "_")) or name.endswith((".crc", "_$folder$", "~", ".swp"))


def _folders_in(path: str) -> str:
    """A hint for a directory that holds only folders; "" for any other path."""
    if not Path(path).is_dir():
        return ""
    below = [file for file in Path(path).rglob("*") if file.is_file() and not any(map(_is_left_out, file.parts[1:]))]
    if not below:
        return ""
    pattern = Path(path) / "**" / f"*{min(below).suffix}"
    return f", only folders (files in them: {len(below):,}; to read them all, write '{pattern}')"
