"""The rows of a run that take an answer without a request: found at its first start, and stored for later ones."""

from collections.abc import Callable, Iterable

import msgspec

from batchrun.records import Notice
from batchrun.source import Source
from batchrun.startup import carry, input_pass
from batchrun.startup import shard as shards
from batchrun.startup.answer_match import Questions
from batchrun.startup.run_options import Start
from batchrun.store import origins
from batchrun.store.manifest import Manifest
from batchrun.store.origins import Origins


def find(
    start: Start, manifest: Manifest, keys: Iterable[tuple[bytes, int]], note: Callable[[str], None]
) -> Origins | None:
    """The rows that take an answer without a request, by their keys; None if the job sends all of them."""
    job, directory = start.job, start.directory
    wanted = carry.wanted(job, manifest.rows, manifest.layout)
    if wanted is None:
        return None
    made = carry.make(job, keys, wanted, directory.path, directory.origins_of(manifest.layout), note)
    if (line := carry.in_words(made)) is not None:
        fields = {"rows": made.rows, "to_send": made.new, "reused": made.reused, "duplicates": made.duplicates}
        note(Notice(line, "reused", **fields))
    return made


def stored_or_found(start: Start, known: Manifest, source: Source) -> Origins | None:
    """The origins of the run's rows, as stored. They are found again, which reads the input once more for its keys, if
    the job wants others or their sources have changed.
    """
    job, directory, checkpoint = start.job, start.directory, start.checkpoint
    entry = checkpoint.manifest_entries().get(origins.ENTRY, "null")
    made = msgspec.json.decode(entry, type=Origins | None)
    path = directory.origins_of(known.layout)
    wanted = carry.wanted(job, known.rows, known.layout, known.first_row)
    if carry.is_current(made, wanted, path):
        return None if wanted is None else made
    settled, opened = checkpoint.totals.settled(), start.opened_rows(known)
    if start.options.read_only or settled == known.rows or (checkpoint.has_reopened and opened == known.rows):
        return None  # only rows of a retry are left
    with Questions(directory.path) as keys:
        as_read = job if known.share is None else shards.reading(job, known.dialect)
        found = input_pass.check(source, as_read, directory, start.options, keys.add)
        made = find(start, known, keys.rows(found.rejected), start.options.note)
    checkpoint.write_manifest({origins.ENTRY: encoded(made)})
    return made


def encoded(made: Origins | None) -> str:
    """The checkpoint's entry for them."""
    return msgspec.json.encode(made).decode()
