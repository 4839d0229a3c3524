"""A hive directory that many runs write to: each replaces the partitions that it has rows for, and touches no other.

A partition changes in one step: readers see its old files or the new one, never some of both. A publish that was cut is
repeated by the next start.
"""

from pathlib import Path

from batchrun import durable
from batchrun.durable import TEMP_SUFFIX, disk_errors, fsync
from batchrun.errors import DiskError, InputError, JobError
from batchrun.job.settings import Output, Storage
from batchrun.records import FinishedResult
from batchrun.source import InputFile
from batchrun.storage import urls
from batchrun.store import remote_dataset
from batchrun.store.rundir import RunDirectory
from batchrun.tables import partitioned

_ENVIRONMENT = Storage()


def require_possible(output: Output, inputs: tuple[InputFile, ...], access: Storage = _ENVIRONMENT) -> None:
    """Returns if the partitions can be put into `output.dataset`, or the job has none. Writes nothing.

    Raises:
        JobError: the dataset is the input, or is divided by other keys.
        InputError, StorageError: it can't be read.
    """
    if output.dataset is None:
        return
    if urls.is_url(output.dataset):
        remote_dataset.require_possible(output.dataset, output.partition_by, inputs, access)
        return
    dataset = Path(output.dataset)
    root = dataset.resolve()
    if any(isinstance(file, Path) and file.resolve().is_relative_to(root) for file in inputs):
        raise JobError(f"output.dataset: {dataset} holds the run's input; name another directory")
    folder = dataset
    for key in output.partition_by:
        children = _children(folder)
        for child in children:
            if not child.is_dir() or child.name.partition("=")[0] != partitioned.escaped(key):
                raise JobError(
                    f"output.dataset: {child} is not a folder named {key}=…; the dataset has other keys than "
                    f"{', '.join(output.partition_by)}"
                )
        if not children:
            return
        folder = children[0]
    if deeper := [child for child in _children(folder) if child.is_dir()]:
        raise JobError(f"output.dataset: {deeper[0]} is a folder below those of {', '.join(output.partition_by)}")


def _children(folder: Path) -> list[Path]:
    """What readers of the dataset see there."""
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise JobError(f"output.dataset: {folder} is a file; name a directory")
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "_")))
    except OSError as error:
        raise InputError(f"output.dataset: {folder} can't be read: {error.strerror}") from error


def try_out(output: Output, access: Storage = _ENVIRONMENT) -> None:
    """Writes a small file in `output.dataset`, or where it will be made, and removes it, if the job has one.

    Raises:
        JobError: it can't be written.
        DiskError: its disk is full.
        StorageError: the store refuses, or can't be reached.
    """
    if output.dataset is None:
        return
    if urls.is_url(output.dataset):
        remote_dataset.try_out(output.dataset, access)
        return
    _children(Path(output.dataset))
    try:
        durable.try_out(Path(output.dataset))
    except OSError as error:
        if durable.is_full(error):
            raise DiskError(
                f"output.dataset: {output.dataset}: {error.strerror}; {durable.next_step(error)}"
            ) from error
        raise JobError(
            f"output.dataset: {output.dataset} can't be written: {error.strerror}; name another directory"
        ) from error


def publish(
    written: FinishedResult, directory: RunDirectory, dataset: str, run_id: str, access: Storage = _ENVIRONMENT
) -> int:
    """Every partition of the result is in the dataset in place of what was there; returns how many. Can be repeated.

    No byte is copied if both are on one file system.

    Raises:
        DiskError, StorageError: a partition could not be put there; it is as it was.
    """
    if urls.is_url(dataset):
        return remote_dataset.publish(written, directory.path, dataset, access)
    return _publish(written, directory, Path(dataset), run_id)


def _publish(written: FinishedResult, directory: RunDirectory, dataset: Path, run_id: str) -> int:
    staging = dataset.with_name(f".{dataset.name}.{run_id}{TEMP_SUFFIX}")
    with disk_errors(dataset):
        dataset.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.remove_folder(staging)
        staging.mkdir(mode=0o700)
        for file in written.files:
            source = directory.path / file.name
            partition = dataset / Path(file.name).relative_to(written.folder).parent
            new = staging / "partition"
            new.mkdir(mode=0o700)
            durable.link(source, new / source.name)
            _make_above(partition, dataset)
            durable.replace_folder(new, partition)
            durable.remove_folder(new)
        durable.remove_folder(staging)
    return len(written.files)


def _make_above(partition: Path, dataset: Path) -> None:
    """The folders between the two are there, on disk."""
    for folder in reversed(partition.relative_to(dataset).parents):
        if folder.parts and not (dataset / folder).exists():
            (dataset / folder).mkdir(mode=0o700)
            fsync((dataset / folder).parent)
