"""A run whose result goes to an object store: its own directory is on this machine, the result is published at the end.

Before the first request the place must be free: no other run works there (`storage.claim`) or has its result there. A
machine without the run's directory finds the same run complete there, and sends nothing.
"""

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchrun import signals
from batchrun.destination import restore
from batchrun.destination.replica import Replica, kept_parts
from batchrun.dispatch.runlog import RunLog
from batchrun.durable import replace_bytes
from batchrun.errors import BatchrunError, RunLockedError, StorageError, quoted
from batchrun.job.job import Job
from batchrun.report import summary as summaries
from batchrun.run_summary import Summary
from batchrun.source import digest, find_files
from batchrun.storage import publish
from batchrun.storage.claim import Claim, Writer, this_process
from batchrun.storage.folder import RemoteFolder
from batchrun.storage.publish import Publication, Published, RunRecord
from batchrun.storage.urls import Url
from batchrun.store import result, run_path
from batchrun.store.checkpoint import read_finished
from batchrun.store.chunks import Mirror
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory


def run(
    job: Job, directory: RunDirectory, url: Url, work: Callable[[Mirror | None], Summary], note: Callable[[str], None]
) -> Summary:
    """Does the `work` of a start, which gets the mirror of its chunks, then publishes the result if it is complete.

    Raises:
        RunLockedError: another run works there, or has its result there.
        StorageError: the store refuses or can't be reached; the same command tries again.
        BatchrunError: as `work`.
    """
    folder = RemoteFolder(url, job.storage)
    directory.create()
    mine = this_process(_writer(directory), job.name)
    with Claim(folder, mine) as claim:
        if (there := _published_elsewhere(job, directory, folder, mine)) is not None:
            note(f"{url}: complete already; nothing is sent")
            return there
        run_id = _run_id(directory)
        publish.require_ours(folder, run_id)
        owner = None if run_id is None else restore.owner_of(folder, run_id)
        if owner is not None and owner.writer != mine.writer:
            raise RunLockedError(
                f"{directory.path}: another machine has taken over this run ({owner}); move this directory away, and "
                "the same command continues from what the other one stored"
            )
        mirror = None
        if job.output.keep_parts_remote:
            mirror = Replica(folder, mine, claim, note)
            if not directory.checkpoint.exists():
                with signals.raised():
                    found = restore.restore(job, folder, directory)
                if found is not None:
                    note(found)
        summary = work(mirror)
        return _published(job, directory, summary, claim, note) if summary.complete else summary


def require_usable(job: Job, directory: RunDirectory, url: Url) -> None:
    """Returns if a start could publish there: the store accepts a small object, and no other run has its result there.

    For `check`, which claims nothing.

    Raises:
        RunLockedError: another run has.
        StorageError: the store refuses or can't be reached.
    """
    folder = RemoteFolder(url, job.storage)
    folder.try_out()
    record = publish.record_of(folder)
    if record is None or not _answers(record, job):
        publish.require_ours(folder, _run_id(directory))


def is_taken(job: Job, path: Path) -> bool:
    """Whether a directory that `--new` could use belongs to a run already, on this machine or in the store."""
    url = run_path.published_at(job.output, path)
    return path.exists() or (url is not None and bool(RemoteFolder(url, job.storage).objects()))


def elsewhere(job: Job) -> tuple[Path, str] | None:
    """The newest run of the job that another machine has left unfinished with its parts in the store, and its date."""

    def folders(above: str) -> list[str]:
        url = run_path.published_at(job.output, Path(above))
        return [] if url is None else RemoteFolder(url, job.storage).folders()

    if not job.output.keep_parts_remote:
        return None
    for path, date in run_path.dates_among(job, folders)[:1]:
        url = run_path.published_at(job.output, path)
        folder = None if url is None else RemoteFolder(url, job.storage)
        if folder is not None and publish.published_run(folder) is None and folder.below(publish.RUNS).objects():
            return path, date
    return None


def command(line: str, job: Job, url: Url) -> str:
    """The command line that resumes the run, which names its place on any day."""
    state = "" if job.output.state_dir is None else f" --state-dir {quoted(job.output.state_dir)}"
    return f"{line} -o {quoted(url)}{state}"


def _writer(directory: RunDirectory) -> str:
    """This directory's own name among the writers of a place: a copy of a run elsewhere has another."""
    try:
        return directory.writer.read_text("ascii")
    except FileNotFoundError:
        replace_bytes(directory.writer, secrets.token_hex(8).encode())
        return directory.writer.read_text("ascii")


def _run_id(directory: RunDirectory) -> str | None:
    """The run in the directory; None if none has started."""
    found = (directory.read_summary() or {}).get("run_id")
    return found if isinstance(found, str) and found else None


def _published_elsewhere(job: Job, directory: RunDirectory, folder: RemoteFolder, mine: Writer) -> Summary | None:
    """The summary of the complete result in the store if another machine published it for this job and input, or if it
    completed the run of this directory.
    """
    record, run_id = publish.record_of(folder), _run_id(directory)
    if record is None or record.writer == mine.writer or publish.published_run(folder) is None:
        return None
    if (run_id is not None and run_id != record.run_id) or not _answers(record, job):
        return None
    try:
        return msgspec.json.decode(folder.read(publish.SUMMARY) or b"", type=Summary)
    except msgspec.DecodeError:
        return None


def _answers(record: RunRecord, job: Job) -> bool:
    """True if the result was made from the job and the input as they are now."""
    if record.fingerprint != job.fingerprint() or job.input.path in (None, "-"):
        return False
    files = find_files(job.input.path or "", job.input.partitions, job.storage)
    return tuple(map(digest, files)) == record.digests


def _published(
    job: Job, directory: RunDirectory, summary: Summary, claim: Claim, note: Callable[[str], None]
) -> Summary:
    """The summary, with the places of the published files.

    Raises:
        BatchrunError: the result is complete on this machine, and not published.
    """
    folder, entries = claim.folder, read_finished(directory.checkpoint)
    known, written = Manifest.decode(entries), result.finished(entries)
    files = [Published(each.name, directory.path / each.name, each.digest) for each in written.files]
    beside = [Published(each.name, directory.path / each.name, each.digest) for each in written.beside]
    record = RunRecord(
        known.run_id, known.job, job.fingerprint(), known.digests, summary.rows_in_output, claim.mine.writer
    )
    found = summaries.read(directory)
    places = {name: str(folder.url.child(Path(path).name)) for name, path in found.files.items()}
    content = msgspec.structs.replace(found, files=places).to_json()
    with contextlib.closing(RunLog(directory.log)) as log:
        try:
            kept = kept_parts(folder, known.run_id) if job.output.keep_parts_remote else {}
            with signals.raised():  # the event loop has removed these handlers at its end
                new = publish.publish(claim, Publication(files, beside, content, record), kept)
        except BatchrunError as error:
            log.write("publish failed", url=str(folder), why=str(error))
            why = f"{error} (the result is complete in {directory.path}; publishing it sends no request)"
            if isinstance(error, StorageError):
                raise StorageError(why) from error
            raise
        if new:
            log.write("published", url=str(folder))
            note(f"published at {folder}")
    return msgspec.structs.replace(summary, files=places)
