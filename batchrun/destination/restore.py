"""Restores the directory of a run from its replica in the object store, on a machine that has nothing of it.

Everything that a sealed part holds, and every row that was settled when the checkpoint was copied, is there with its
bill. Rows of open chunks that were pending then may have been sent since: they are sent again, and listed as possibly
billed with their upper bounds, because no one knows what the lost machine paid for them.
"""

from collections.abc import Iterator
from decimal import Decimal

import msgspec

from batchrun.destination.replica import COPY, INPUT, OWNER, PART
from batchrun.durable import digest
from batchrun.errors import StorageError
from batchrun.job.job import Job
from batchrun.records import PossiblyBilled
from batchrun.report.wording import plural
from batchrun.storage.claim import Writer
from batchrun.storage.folder import RemoteFolder
from batchrun.storage.publish import RUNS
from batchrun.store import price_tables
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import rows_stored

CAUSE = "machine"
"""The cause of possibly billed requests of a lost machine."""


def restore(job: Job, place: RemoteFolder, directory: RunDirectory) -> str | None:
    """Restores the directory of the unfinished run in the store. Returns a line on what was found and what is sent
    again; None if the store has no such run.

    Raises:
        StorageError: the store can't be read, or what it holds is damaged.
    """
    copies = [each for each in place.below(RUNS).objects() if each.name.endswith(".db")]
    if not copies:
        return None
    newest = max(copies, key=lambda each: (each.mtime_ns, each.name))
    folder = place.below(f"{RUNS}/{newest.name.partition('/')[0]}")  # of the run whose checkpoint was copied last
    names = [each.name for each in folder.objects()]
    _, _, copy = max((int(match[1]), name, name) for name in names if (match := COPY.fullmatch(name)))
    directory.create()
    local = directory.path / "checkpoint.db.tmp"
    folder.fetch(copy, local)
    _require(digest(local) in copy, folder, copy)
    checkpoint = Checkpoint(local, free_reserve=lambda: False)
    try:
        chunks = checkpoint.chunks()
        for chunk in chunks:
            _fetch_chunk(folder, names, chunk, directory)
        doubts = list(_doubts(job, folder, names, checkpoint, chunks, directory))
        checkpoint.add_possibly_billed(doubts)
    finally:
        checkpoint.close(finished=True)  # nothing of it is in a log beside the file
    local.rename(directory.checkpoint)  # last: an interrupted restore starts again
    sealed = [chunk for chunk in chunks if not chunk.open]
    return _in_words(folder, sealed, doubts)


def owner_of(place: RemoteFolder, run_id: str) -> Writer | None:
    """The writer that works on the run; None if the store has no replica of it."""
    content = place.below(f"{RUNS}/{run_id}").read(OWNER)
    return None if content is None else msgspec.json.decode(content, type=Writer)


def _fetch_chunk(folder: RemoteFolder, names: list[str], chunk: Chunk, directory: RunDirectory) -> None:
    missing = {"part"} if chunk.generation else set()
    missing |= {"input"} if chunk.open else set()
    for name in names:
        part, stored = PART.fullmatch(name), INPUT.fullmatch(name)
        if part and (int(part[1]), int(part[2])) == (chunk.chunk, chunk.generation):
            to, expected = directory.part_of(chunk.chunk, chunk.generation), chunk.part_digest
        elif stored and chunk.open and (int(stored[1]), stored[3]) == (chunk.chunk, chunk.input_digest):
            to, expected = directory.input_of(chunk.chunk, int(stored[2])), chunk.input_digest
        else:
            continue
        missing.discard(name.rpartition(".")[2])
        folder.fetch(name, to)
        _require(digest(to) == expected, folder, name)
    _require(not missing, folder, f"{chunk.chunk:06d}")


def _require(sound: bool, folder: RemoteFolder, name: str) -> None:
    if not sound:
        raise StorageError(
            f"{folder.url.child(name)}: is missing or damaged; remove {folder} to start again and pay again"
        )


def _doubts(
    job: Job,
    folder: RemoteFolder,
    names: list[str],
    checkpoint: Checkpoint,
    chunks: list[Chunk],
    directory: RunDirectory,
) -> Iterator[PossiblyBilled]:
    """The rows that the lost machine may have sent, and whose outcome no one here knows."""
    entries = checkpoint.manifest_entries()
    manifest = Manifest.decode(entries)
    most_usd = price_tables.most_usd(manifest, price_tables.decode(entries), *job.service_tiers)
    most_tokens = max(map(sum, manifest.max_request.values()), default=0)
    bounds = most_usd, most_tokens  # of any one request
    invocation = checkpoint.last_invocation()
    for chunk in chunks:
        if chunk.open:
            known = {each.row: each.n for each in checkpoint.discarded(chunk)}
            again = checkpoint.reopened(chunk)
            rows = again.keys() if chunk.generation else range(chunk.first_row, chunk.end_row)
            for row in sorted(set(rows) - checkpoint.settled_rows(chunk)):
                n = max(known.get(row, 0), again[row].attempts if row in again else 0) + 1
                yield PossiblyBilled(row, n, "", *bounds, CAUSE, invocation)
    first = chunks[-1].end_row if chunks else manifest.first_row
    for name in sorted(names):
        if (match := INPUT.fullmatch(name)) and int(match[1]) >= len(chunks):  # opened after the checkpoint was copied
            scratch = directory.path / "input.tmp"
            folder.fetch(name, scratch)
            _require(digest(scratch) == match[3], folder, name)
            end = first + rows_stored(scratch)
            scratch.unlink()
            for row in range(first, end):
                yield PossiblyBilled(row, 1, "", *bounds, CAUSE, invocation)
            first = end


def _in_words(folder: RemoteFolder, sealed: list[Chunk], doubts: list[PossiblyBilled]) -> str:
    rows = sum(chunk.rows for chunk in sealed)
    usd = [each.upper_bound_usd for each in doubts]
    most = "" if None in usd else f", for up to ${sum(filter(None, usd), Decimal(0)):,.4f}"
    found = (
        f"this machine has nothing of the run; {plural(rows, 'row')} in {plural(len(sealed), 'part')} found in {folder}"
    )
    if not doubts:
        return found
    return (
        f"{found}. The machine before may have sent {plural(len(doubts), 'row')} of open chunks{most}; no one knows "
        "which, so they are sent again, and listed as possibly billed"
    )
