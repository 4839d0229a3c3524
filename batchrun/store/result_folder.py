"""A result of several files: a folder that is made beside its place and appears there as a whole, with a manifest."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun import durable
from batchrun.durable import disk_errors
from batchrun.job.settings import Output
from batchrun.records import FinishedResult, ResultFile
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files, partitioned

MANIFEST = "_manifest.json"
"""The file in the folder that names all others. Readers of Parquet folders leave out names that begin with `_`."""

VERSION = 1
"""Of the manifest's format."""


def stage_parts(parts: Sequence[tuple[Path, str, int]], directory: RunDirectory) -> list[ResultFile]:
    """Moves the parts (path, digest, rows) into the staging folder. Can be repeated after a kill at any point.

    Raises:
        CheckpointError: a part is missing, or is not what was sealed.
    """
    staging = directory.staging
    with disk_errors(staging):
        staging.mkdir(mode=0o700, exist_ok=True)
        for number, (path, expected, _) in enumerate(parts):
            target, found = files.part_in(staging, number), place_of(path, number, expected, directory)
            files.require_digest(found, expected)
            if found.parent == directory.completions_folder:
                durable.link(found, target)
            else:
                found.rename(target)
        wanted = {files.part_in(staging, number) for number in range(len(parts))}
        for left in staging.iterdir():  # what another start has staged, by another layout of the chunks
            if left not in wanted:
                durable.remove_folder(left) if left.is_dir() else left.unlink()
    return [
        described(directory.path, files.part_in(staging, number), digest, rows)
        for number, (_, digest, rows) in enumerate(parts)
    ]


def stage_partitions(
    parts: Sequence[tuple[Path, str, int]], schema: pa.Schema, output: Output, directory: RunDirectory
) -> list[ResultFile]:
    """Writes the rows of the parts into the staging folder, a file for each partition. The parts stay.

    Raises:
        CheckpointError: a part is missing, or is not what was sealed.
    """
    durable.remove_folder(directory.staging)
    with disk_errors(directory.staging):
        directory.staging.mkdir(mode=0o700)
    batches = chain.from_iterable(starmap(files.sealed_batches, parts))
    written = partitioned.write(batches, schema, output.partition_by, directory.staging, output.compression)
    return [described(directory.path, *each) for each in written]


def place_of(part: Path, number: int, digest: str, directory: RunDirectory) -> Path:
    """Where the part is that was sealed as `part`: a start that was killed at the end may have moved it into the
    staging folder, or have published it.
    """
    moved = [files.part_in(folder, number) for folder in (directory.staging, directory.completions_folder)]
    there = [each for each in (part, *moved) if each.exists()]
    if len(there) < 2:
        return (there or [moved[1] if directory.completions_folder.exists() else part])[0]
    with disk_errors(part):  # the folder that is replaced has a part of this name, too
        return next((each for each in there if durable.digest(each) == digest), there[0])


def described(root: Path, path: Path, digest: str, rows: int) -> ResultFile:
    """The finished file at `path`, by its name below `root`."""
    found = path.stat()
    return ResultFile(path.relative_to(root).as_posix(), rows, found.st_size, found.st_mtime_ns, digest)


def publish(staged: Iterable[ResultFile], bill: Mapping[str, object], directory: RunDirectory) -> FinishedResult:
    """Puts the staged files in their place, with a manifest beside them. Until then readers see the old folder."""
    before, after = directory.staging.name, directory.completions_folder.name
    names = [(file, file.name.removeprefix(f"{before}/")) for file in staged]
    listed = [
        {"name": name, "rows": file.rows, "bytes": file.size_bytes, "digest": file.digest} for file, name in names
    ]
    content = {"version": VERSION, "rows": sum(file.rows for file, _ in names), "files": listed, "bill": bill}
    path = directory.staging / MANIFEST
    durable.replace_bytes(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")
    manifest = described(directory.path, path, durable.digest(path), 0)
    durable.replace_folder(directory.staging, directory.completions_folder)
    return FinishedResult(
        tuple(msgspec.structs.replace(file, name=f"{after}/{name}") for file, name in names),
        (msgspec.structs.replace(manifest, name=f"{after}/{MANIFEST}"),),
        after,
    )
