"""A shared dataset in an object store, where a file is replaced in one step and a folder is not: so each partition is
one object.

Needs a store that shows the old object until the new one is whole, as S3 and Google Cloud Storage do.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from batchrun.errors import JobError, StorageError
from batchrun.job.settings import Storage
from batchrun.records import FinishedResult
from batchrun.source import InputFile
from batchrun.storage.folder import RemoteFolder, folder_at
from batchrun.storage.objects import RemoteFile
from batchrun.tables import partitioned
from batchrun.tables.files import part_in


def require_possible(dataset: str, keys: Sequence[str], inputs: Iterable[InputFile], access: Storage) -> None:
    """Returns if each object of the dataset is the one file of its partition.

    Raises:
        JobError: the dataset is the input, is divided by other keys, or has partitions of other files.
        StorageError: the store refuses, or can't be reached.
    """
    folder = _folder(dataset, access)
    root = f"{folder.url.path.rstrip('/')}/"
    if any(isinstance(file, RemoteFile) and f"{file.url.path}/".startswith(root) for file in inputs):
        raise JobError(f"output.dataset: {dataset} holds the run's input; name another folder")
    for name in _names(folder):
        if (line := _foreign(name, keys)) is not None:
            raise JobError(f"output.dataset: {folder.url.child(name)} {line}")


def try_out(dataset: str, access: Storage) -> None:
    """Puts a small object there and deletes it.

    Raises:
        StorageError: the store refuses, or can't be reached.
    """
    _folder(dataset, access).try_out()


def publish(written: FinishedResult, root: Path, dataset: str, access: Storage) -> int:
    """Every partition of the result, whose files are below `root`, replaces that of the dataset; returns how many. Can
    be repeated.

    Raises:
        StorageError: the store refuses or can't be reached; a partition that is not replaced yet is as it was.
    """
    folder = _folder(dataset, access)
    files = {Path(file.name).relative_to(written.folder).as_posix(): root / file.name for file in written.files}
    partitions = {name.rpartition("/")[0] for name in files}
    for name in _names(folder):
        if name.rpartition("/")[0] in partitions and name not in files:
            raise StorageError(
                f"{folder.url.child(name)} came there while the run worked, and its partition can't be replaced in one "
                f"step; move it away and run the same command again (the result is complete in {root})"
            )
    for name, local in sorted(files.items()):
        folder.put_file(name, local)
    return len(files)


def _folder(dataset: str, access: Storage) -> RemoteFolder:
    return folder_at(dataset, access, "output.dataset")


def _names(folder: RemoteFolder) -> list[str]:
    """What readers of the dataset see there."""
    names = [each.name for each in folder.objects()]
    return [name for name in names if not any(part.startswith((".", "_")) for part in name.split("/"))]


def _foreign(name: str, keys: Sequence[str]) -> str | None:
    """What is wrong with an object of that name in a dataset by these keys; None: nothing is."""
    *folders, file = name.split("/")
    if [folder.partition("=")[:2] for folder in folders] != [(partitioned.escaped(key), "=") for key in keys]:
        return f"is in no folder named {'/'.join(f'{key}=…' for key in keys)}; the dataset has other keys"
    if (own := part_in(Path(), 0).name) != file:
        return (
            f"is not the one file {own} of its partition, and an object store replaces no folder in one step; "
            "join the files under that name, or name another dataset"
        )
    return None
