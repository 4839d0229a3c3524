"""Publishes a finished result in a folder of an object store, so that it looks finished only when it is.

Each step can be repeated, so a publish that was cut is simply done again.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec

from batchrun.errors import RunLockedError
from batchrun.storage.claim import Claim
from batchrun.storage.folder import CONTROL, LARGEST_COPY_BYTES, RemoteFolder

SUMMARY = "summary.json"
STAGED = f"{CONTROL}/staged"
RUNS = f"{CONTROL}/runs"
"""The replicas of runs that keep their parts in the store while they work."""

RECORD = f"{CONTROL}/run.json"
"""The question that the published result answers, for a start on a machine without the run's directory."""


class Published(msgspec.Struct, frozen=True):
    """A file of the result: its name in the folder, where it is on this machine, and its digest."""

    name: str
    local: Path
    digest: str

    @property
    def staged_name(self) -> str:
        """Its name until all files are there. No pattern such as **/*.parquet finds it, and no other content has it."""
        return f"{self.name}.{self.digest}.part"


class RunRecord(msgspec.Struct, frozen=True):
    """The question that a result answers: the run, its job's fingerprint, the digests of its input, and
    who published it.
    """

    run_id: str
    job: str
    fingerprint: str
    digests: tuple[str, ...]
    rows: int
    writer: str = ""


class Publication(msgspec.Struct, frozen=True):
    """What a publish puts in a folder: the `files` that hold the rows, those `beside` that describe them, the content
    of summary.json, and the record of the run.
    """

    files: Sequence[Published]
    beside: Sequence[Published]
    summary: bytes
    record: RunRecord


class _PublishedRun(msgspec.Struct, frozen=True):
    """The fields of a summary that decide whether it may be replaced."""

    run_id: str = ""
    complete: bool = False
    job: str = ""


def published_run(folder: RemoteFolder) -> _PublishedRun | None:
    """The run whose complete result is in the folder; None if there is none."""
    content = folder.read(SUMMARY)
    if content is None:
        return None
    try:
        found = msgspec.json.decode(content, type=_PublishedRun)
    except msgspec.DecodeError:
        return None
    return found if found.complete else None


def record_of(folder: RemoteFolder) -> RunRecord | None:
    """The record of the run that was published last; None if it is missing or can't be read."""
    try:
        return msgspec.json.decode(folder.read(RECORD) or b"", type=RunRecord)
    except msgspec.DecodeError:
        return None


def publish(
    claim: Claim,
    result: Publication,
    kept: Mapping[str, str] = MappingProxyType({}),
    reached: Callable[[str], None] = lambda step: None,
) -> bool:
    """The claimed folder holds the result; False if it held it already. `kept` names objects that are in the folder
    already, by digest. `reached` gets the name of each step that is done.

    Raises:
        RunLockedError: another run has published there, or works there.
        StorageError: the store refuses, or can't be reached. The result does not look finished.
    """
    folder, run_id = claim.folder, result.record.run_id
    if folder.read(SUMMARY) == result.summary:
        return False
    require_ours(folder, run_id)
    claim.require_held()
    folder.delete(SUMMARY)  # a reader who finds none knows that the files may be of two results
    reached("summary deleted")
    _put_files(folder, result.files, run_id, kept, reached)
    names = {each.name for each in (*result.files, *result.beside)}
    for top in sorted({name.partition("/")[0] for name in names if "/" in name}):
        for there in folder.below(top).objects():  # an earlier result may have had more files
            if f"{top}/{there.name}" not in names:
                folder.delete(f"{top}/{there.name}")
    for each in result.beside:
        folder.put_file(each.name, each.local)
        reached(each.name)
    folder.put(RECORD, msgspec.json.encode(result.record))
    claim.require_held()
    reached("files put")
    folder.put(SUMMARY, result.summary)  # last: with it the result looks finished
    if folder.read(SUMMARY) != result.summary:
        raise RunLockedError(f"{folder}: another run has published there at the same time; its result is there")
    for working in (STAGED, f"{RUNS}/{run_id}"):  # files of runs that were cut here, too: the claim keeps others out
        for left in folder.below(working).objects():
            folder.delete(f"{working}/{left.name}")
    return True


def require_ours(folder: RemoteFolder, run_id: str | None) -> None:
    """Returns if the folder holds no complete result, or that of the run.

    Raises:
        RunLockedError: it holds another run's.
    """
    found = published_run(folder)
    if found is not None and found.run_id != run_id:
        raise RunLockedError(
            f"{folder}: holds the complete result of another run ({found.run_id} of job {found.job}); "
            "name another place with -o, or start another run with --new"
        )


def _put_files(
    folder: RemoteFolder,
    files: Sequence[Published],
    run_id: str,
    kept: Mapping[str, str],
    reached: Callable[[str], None],
) -> None:
    """Puts the files in their places. Those that the store itself can copy appear there at nearly the same moment."""
    if len(files) == 1:  # it is replaced as a whole
        folder.put_file(files[0].name, files[0].local)
        reached(files[0].name)
        return
    # sending takes minutes, a copy within the store a moment: readers ignore the name that a file has until then
    staged = f"{STAGED}/{run_id}"
    small = [each for each in files if each.local.stat().st_size <= LARGEST_COPY_BYTES]
    there = {each.name: each.size_bytes for each in folder.below(staged).objects()}
    for each in small:
        if each.digest not in kept and there.get(each.staged_name) != each.local.stat().st_size:
            folder.put_file(f"{staged}/{each.staged_name}", each.local)
            reached(f"staged {each.name}")
    for each in files:
        if each in small:
            folder.copy(kept.get(each.digest) or f"{staged}/{each.staged_name}", each.name)
        else:
            folder.put_file(each.name, each.local)
        reached(each.name)
