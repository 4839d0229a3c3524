"""A changed input or job: compared with the run's own, and adopted if the user accepts it."""

import contextlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import ANOTHER, JobError
from batchrun.job.job import Job
from batchrun.records import Notice
from batchrun.report.cost_lines import scaled
from batchrun.report.wording import are, plural
from batchrun.source import FileIdentity, InputFile, Source, changed, fingerprint, open_source
from batchrun.startup import changes, input_pass, unsent_rows
from batchrun.startup import shard as shards
from batchrun.startup.answer_match import NONE, Questions
from batchrun.startup.run_options import RunOptions, Start
from batchrun.store import origins, variants
from batchrun.store.carry_over import CarryOver
from batchrun.store.chunks import Layout
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant


def changed_input(files: tuple[InputFile, ...], directory: RunDirectory, known: Manifest) -> str | None:
    """How the input differs from the run's, by identity and then by content; None if it does not."""
    what = changed(files, known.files)
    if what is None or shards.digests(files, sharded=known.is_sharded) == known.digests:
        return None
    return "standard input has other rows" if files == (directory.spool,) else f"the input: {what}"


def adopt_changes(
    start: Start, known: Manifest, ways: tuple[Variant, ...], files: tuple[InputFile, ...]
) -> tuple[Manifest, tuple[Variant, ...], int, Source]:
    """The manifest, the variants with this start's, and the source, with changes adopted if the user accepts them.

    Raises:
        JobError: something has changed and is not accepted.
    """
    job, options = start.job, start.options
    identities = fingerprint(files)  # before the content is read, so that a change meanwhile is noticed later
    placed = variants.place(job, ways, known.variant, retrying=options.retry is not None)
    what = changed_input(files, start.directory, known)
    source = open_source(files, job.input.max_line_bytes, None if known.share is None else known.share.span)
    if what is None and options.accept_changes and job.input.image_root is not None:
        what = "the images"
    if placed.changed or what is not None:
        known = _adopt(start, known, placed, source, identities, what)
    else:
        opened = start.opened_rows(known)
        # a chunk is sent as a whole, so a limit within an open one would come too late
        if options.limit is not None and options.limit < opened and start.checkpoint.totals.settled() < opened:
            raise JobError(
                f"--limit {options.limit}: {plural(opened, 'row')} {are(opened)} already started; use at least "
                f"--limit {opened}, or leave it out"
            )
        known = msgspec.structs.replace(known, files=identities)
    return known, placed.variants, placed.number, source


def _adopt(
    start: Start,
    known: Manifest,
    placed: variants.Placed,
    source: Source,
    identities: tuple[FileIdentity, ...],
    what: str | None,
) -> Manifest:
    """The manifest over the changed input or job, with new chunks, if the change is accepted or loses nothing. `what`
    has changed besides settings.

    Raises:
        JobError: the change is not accepted; the message has what it would cost. Nothing was sent or discarded.
    """
    job, directory, checkpoint, options = start.job, start.directory, start.checkpoint, start.options
    reasons = placed.changed if what is None else (*placed.changed, what)
    shards.require_unchanged(known, reasons)
    with Questions(directory.path) as questions, Questions(directory.path) as pictures:
        found = input_pass.check(source, job, directory, options, questions, pictures)
        new = input_pass.manifest_of(job, source, identities, found, run_id=known.run_id, created_at=known.created_at)
        expected = None if known.estimate is None else scaled(known.estimate, found.rows)
        new = msgspec.structs.replace(
            new, layout=known.layout + 1, variant=placed.number, dialect=found.dialect, estimate=expected
        )
        answers = changes.Answers(directory, checkpoint, known)
        keys_now = questions.rows(found.rejected)
        seen, matches = changes.examine(answers, keys_now, found.rows, reasons)
        with matches, _deleted_on_error(directory.origins_of(new.layout)):
            made = unsent_rows.find_unsent(start, new, questions.rows(found.rejected), note=lambda line: None)
            carry_over = CarryOver(made, directory.origins_of(new.layout))
            seen = msgspec.structs.replace(seen, carried=carry_over.count(found.rows, lambda row: matches[row] == NONE))
            _require_consent(job, options, seen, placed.changed)
            counts = {"kept": seen.kept, "dropped": seen.dropped, "to_send": seen.to_send}
            options.note(Notice(str(seen), "changes", changed=seen.changed, **counts))
            entries = {**new.encode(), **variants.encode(placed.variants), **origins.encode(made)}
            input_pass.keep_digests(job, directory, new.layout, pictures, found)
            rows = new.rows if options.limit is None else options.limit
            layout = Layout.of(new, source, input_pass.schema_of(source, new), rows)
            changes.lay_out(answers, matches, layout, entries, carry_over)
            for old in (directory.images_of(known.layout), directory.origins_of(known.layout)):
                old.unlink(missing_ok=True)
    return new


@contextlib.contextmanager
def _deleted_on_error(path: Path) -> Iterator[None]:
    """Deletes what the block has written at `path` if the block raises."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _require_consent(job: Job, options: RunOptions, seen: changes.Changes, settings: tuple[str, ...]) -> None:
    """Returns if the user accepts the change, or if it discards and moves nothing. `settings` of the job have changed.

    Raises:
        ChangedError: the change is not accepted.
    """
    if options.read_only or not (seen.harmless or options.accept_changes):
        raise ChangedError(f"{seen}. Resume with --accept-changes, restore it, or {ANOTHER}", seen)
    if seen.harmless:
        return
    if options.accept_changes == "input" and settings:
        raise ChangedError(
            f"{seen}. --accept-changes=input accepts changed rows and not a changed job ({', '.join(settings)}); "
            f"restore it, resume with --accept-changes, or {ANOTHER}",
            seen,
        )
    bound = job.input.max_changed
    most = seen.before * Decimal(bound[:-1]) / 100 if isinstance(bound, str) else bound
    if most is not None and seen.rows_changed > most:
        raise ChangedError(
            f"{seen}. {plural(seen.rows_changed, 'row')} of {seen.before:,} changed, and input.max_changed = {bound} "
            f"allows {most:,.0f}; check that the input is complete, raise the bound, or {ANOTHER}",
            seen,
        )


class ChangedError(JobError):
    """The input or the job differs from the run's, and answers would be discarded or moved; `changes` says how."""

    def __init__(self, message: str, found: changes.Changes) -> None:
        super().__init__(message)
        self.changes = found
