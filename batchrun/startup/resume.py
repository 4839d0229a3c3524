"""Plans a start before its first request: a new run, or one to resume.

A run's manifest is fixed when the run first starts: its requests, its input and the shape of its output. Later starts
are compared with it. Limits, prices, retries and the budget may change from start to start.
"""

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun.errors import ANOTHER, CheckpointError, JobError
from batchrun.job.job import Job
from batchrun.limits import daily
from batchrun.policy import failing
from batchrun.price_list import lookup
from batchrun.prices import PriceTable
from batchrun.records import Notice
from batchrun.report.cost_lines import scaled
from batchrun.report.wording import are, plural
from batchrun.source import FileIdentity, InputFile, Source, changed, fingerprint, open_source
from batchrun.startup import carry, changes, input_pass, preconditions, previous_run, stdin_copy
from batchrun.startup import shard as shards
from batchrun.startup.answer_match import NONE, Questions
from batchrun.startup.estimate import estimate
from batchrun.startup.run_options import RunOptions
from batchrun.store import origins, variants
from batchrun.store.carry_over import CarryOver
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import InputShare, Manifest
from batchrun.store.origins import Origins
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant
from batchrun.tables.arrow_types import Column
from batchrun.tables.json_columns import ColumnTypes

SHAPE = ("columns", "prefix", "raw", "layout", "format", "partition_by", "compression", "chunk_rows", "chunk_bytes")
"""The output settings that a run keeps from its first start, because its parts were written with them."""


class Plan(msgspec.Struct, frozen=True):
    """Everything that a start needs to know. `prices` has None for a model without a known price.

    `rows`: how many rows this start settles, all or the first of them. `variants[k]` is the request of variant k, 0 for
    the run's first job; `variant` is that of this start's job. `origins` says which rows are not sent.
    """

    manifest: Manifest
    rows: int
    variants: tuple[Variant, ...]
    variant: int
    resumed: bool
    source: Source
    types: ColumnTypes | None
    schema: pa.Schema
    parsed: Column
    prices: dict[str, PriceTable | None]
    origins: Origins | None = None


def make(job: Job, directory: RunDirectory, checkpoint: Checkpoint, options: RunOptions, now: datetime) -> Plan:
    """Plans this start. A first start reads and checks the whole input and stores the manifest.

    Raises:
        JobError, InputError: something is invalid or has changed; nothing was sent.
    """
    entries, today = checkpoint.manifest_entries(), now.astimezone().date().isoformat()
    if Manifest.ENTRY in entries:
        return _resume(job, directory, checkpoint, options, entries, today)
    if options.retry is not None:
        raise JobError(
            f"{directory.path}: no run was started here, so no rows can be retried; name its directory with -o, or its "
            "day with --date"
        )
    _require_unused(directory)
    paths = input_pass.input_files(job, directory, options, started=False)
    files = fingerprint(paths)
    own = None
    if options.shard is not None:
        skip, scratch = options.skip_invalid, directory.path
        own = shards.find(job, paths, options.shard, scratch, options.checked, skip_invalid=skip)
    source = open_source(paths, job.input.max_line_bytes) if own is None else own.source
    as_read = job if own is None else shards.reading(job, own.dialect)
    with Questions(directory.path) as keys, Questions(directory.path) as pictures:
        found = input_pass.read(source, as_read, directory, options, keys.add, pictures.add)
        if own is not None:
            found = msgspec.structs.replace(found, types=own.types)
        share = None if own is None else InputShare(own.shard, own.span, tuple(sorted(map(str, failing(job.finish)))))
        run_id = uuid.uuid4().hex[:12]
        new = input_pass.manifest_of(job, source, files, found, run_id=run_id, created_at=now, share=share)
        input_pass.keep_digests(job, directory, new.layout, pictures, found)
        made = _origins(job, directory, new, options, keys.rows(found.rejected))
    ways = (variants.of_job(job),)
    plan = _plan(job, new, ways, 0, source, {}, options.limit, today, resumed=False)
    before = previous_run.newest(job, besides=directory.path)
    to_send = found.rows if made is None else made.new
    expected = estimate(found, job, plan.prices, to_send, None, daily.left_s(now), before)
    expected = msgspec.structs.replace(expected, rows=found.rows)  # those that are not sent cost nothing
    plan = msgspec.structs.replace(plan, manifest=msgspec.structs.replace(new, estimate=expected), origins=made)
    entries = {**plan.manifest.encode(), "prices": _encode(plan.prices), **variants.encode(ways)}
    checkpoint.write_manifest({**entries, origins.ENTRY: _encode(made)})
    return plan


def _origins(
    job: Job, directory: RunDirectory, manifest: Manifest, options: RunOptions, keys: Iterable[tuple[bytes, int]]
) -> Origins | None:
    """Which rows take an answer without a request, by their keys; None if the job sends all of them."""
    wanted = carry.wanted(job, manifest.rows, manifest.layout)
    if wanted is None:
        return None
    made = carry.make(job, keys, wanted, directory.path, directory.origins_of(manifest.layout), options.note)
    if (line := carry.in_words(made)) is not None:
        fields = {"rows": made.rows, "to_send": made.new, "reused": made.reused, "duplicates": made.duplicates}
        options.note(Notice(line, "reused", **fields))
    return made


def _require_unused(directory: RunDirectory) -> None:
    """Returns if no run was started here: a run that lost its checkpoint must not be overwritten and paid for again."""
    for path in (directory.completions, directory.inflight, *directory.parts.iterdir()):
        if path.exists():
            raise CheckpointError(
                f"{path} belongs to a run whose checkpoint.db is missing or empty; keep a copy, and {ANOTHER}"
            )


def require_same_shape(job: Job, known: Manifest) -> None:
    """Returns if the job wants the output in the shape that this run has.

    Raises:
        JobError: a setting differs; the message says which, and what to do.
    """
    for name in SHAPE:
        if getattr(job.output, name) != getattr(known.output, name):
            raise JobError(f"output.{name} can't change within a run; restore it to resume, or {ANOTHER}")


def changed_input(files: tuple[InputFile, ...], directory: RunDirectory, known: Manifest) -> str | None:
    """How the input differs from the one of the run, by identity and then by content; None if it is the same."""
    what = changed(files, known.files)
    if what is None or shards.digests(files, sharded=known.is_sharded) == known.digests:
        return None
    return "standard input has other rows" if files == (directory.spool,) else f"the input: {what}"


def _resume(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, options: RunOptions, entries: dict[str, str], today: str
) -> Plan:
    known, ways = Manifest.decode(entries), variants.decode(entries)
    shards.require_same(options.shard, known, directory.path)
    require_same_shape(job, known)
    stdin_copy.settle(directory, known)
    files = stdin_copy.put_in_place(input_pass.input_files(job, directory, options), directory)
    try:
        known, ways, variant, source = _as_it_is_now(job, directory, checkpoint, options, known, ways, files)
        made = _origins_now(job, directory, checkpoint, options, known, source)
    finally:
        stdin_copy.settle(directory, Manifest.decode(checkpoint.manifest_entries()))
    prices_known = msgspec.json.decode(entries.get("prices", "{}"), type=dict[str, PriceTable | None])
    limit = None if options.limit is None else max(options.limit, _opened_rows(checkpoint, known))
    plan = _plan(job, known, ways, variant, source, prices_known, limit, today, resumed=True)
    if plan.prices != prices_known:
        checkpoint.write_manifest({"prices": _encode(plan.prices)})
    return msgspec.structs.replace(plan, origins=made)


def _origins_now(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, options: RunOptions, known: Manifest, source: Source
) -> Origins | None:
    """The origins of the run's rows, as stored. They are found again, which reads the input once more for its keys, if
    the job wants others or their sources have changed.
    """
    entry = checkpoint.manifest_entries().get(origins.ENTRY, "null")
    made = msgspec.json.decode(entry, type=Origins | None)
    path = directory.origins_of(known.layout)
    wanted = carry.wanted(job, known.rows, known.layout, known.first_row)
    if carry.still_holds(made, wanted, path):
        return None if wanted is None else made
    settled, opened = checkpoint.totals.settled(), _opened_rows(checkpoint, known)
    if options.only_look or settled == known.rows or (checkpoint.has_reopened and opened == known.rows):
        return None  # only rows of a retry are left
    with Questions(directory.path) as keys:
        as_read = job if known.share is None else shards.reading(job, known.dialect)
        found = input_pass.read(source, as_read, directory, options, keys.add)
        made = _origins(job, directory, known, options, keys.rows(found.rejected))
    checkpoint.write_manifest({origins.ENTRY: _encode(made)})
    return made


def _as_it_is_now(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    options: RunOptions,
    known: Manifest,
    ways: tuple[Variant, ...],
    files: tuple[InputFile, ...],
) -> tuple[Manifest, tuple[Variant, ...], int, Source]:
    """The manifest, the variants with this start's, and the source, with changes adopted if the user accepts them.

    Raises:
        JobError: something has changed and is not accepted.
    """
    identities = fingerprint(files)  # before the content is read, so that a change meanwhile is noticed later
    ways, variant, settings = variants.place(job, ways, known.variant, retrying=options.retry is not None)
    what = changed_input(files, directory, known)
    source = open_source(files, job.input.max_line_bytes, None if known.share is None else known.share.span)
    if what is None and options.accept_changes and job.input.image_root is not None:
        what = "the images"
    if settings or what is not None:
        reasons = (*settings, *([what] if what else []))
        shards.require_unchanged(known, reasons)
        known = _adopt(job, directory, checkpoint, options, known, ways, variant, source, identities, reasons, settings)
    else:
        _require_limit_in_time(options.limit, checkpoint, known)
        known = msgspec.structs.replace(known, files=identities)
    return known, ways, variant, source


def _adopt(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    options: RunOptions,
    known: Manifest,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    identities: tuple[FileIdentity, ...],
    reasons: tuple[str, ...],
    settings: tuple[str, ...],
) -> Manifest:
    """The manifest over the changed input or job, with new chunks, if the change is accepted or loses nothing.

    Raises:
        JobError: the change is not accepted; the message has what it would cost. Nothing was sent or discarded.
    """
    with Questions(directory.path) as questions, Questions(directory.path) as pictures:
        found = input_pass.read(source, job, directory, options, questions.add, pictures.add)
        new = input_pass.manifest_of(job, source, identities, found, run_id=known.run_id, created_at=known.created_at)
        expected = None if known.estimate is None else scaled(known.estimate, found.rows)
        new = msgspec.structs.replace(
            new, layout=known.layout + 1, variant=variant, dialect=found.dialect, estimate=expected
        )
        answers = changes.Answers(directory, checkpoint, known)
        keys_now = questions.rows(found.rejected)
        mean_cost_usd = checkpoint.totals.mean_cost_usd()
        seen, matches = changes.examine(answers, keys_now, found.rows, reasons, mean_cost_usd, directory.path)
        with matches, _unless_refused(directory.origins_of(new.layout)):
            silent = msgspec.structs.replace(options, note=lambda line: None)
            made = _origins(job, directory, new, silent, questions.rows(found.rejected))
            carry_over = CarryOver(made, directory.origins_of(new.layout))
            seen = msgspec.structs.replace(seen, carried=carry_over.count(found.rows, lambda row: matches[row] == NONE))
            _require_consent(job, options, seen, settings)
            counts = {"kept": seen.kept, "dropped": seen.dropped, "to_send": seen.to_send}
            options.note(Notice(str(seen), "changes", changed=seen.changed, **counts))
            schema = input_pass.schema_of(source, new)
            entries = {**new.encode(), **variants.encode(ways), origins.ENTRY: _encode(made)}
            input_pass.keep_digests(job, directory, new.layout, pictures, found)
            changes.lay_out(
                answers, matches, source, new, schema, directory, checkpoint, entries, options.limit, carry_over
            )
            for old in (directory.images_of(known.layout), directory.origins_of(known.layout)):
                old.unlink(missing_ok=True)
    return new


@contextlib.contextmanager
def _unless_refused(path: Path) -> Iterator[None]:
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
    if options.only_look or not (seen.harmless or options.accept_changes):
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


def _require_limit_in_time(limit: int | None, checkpoint: Checkpoint, known: Manifest) -> None:
    """Raises if rows behind the limit belong to an open chunk with pending rows: a chunk is sent as a whole."""
    opened = _opened_rows(checkpoint, known)
    if limit is not None and limit < opened and checkpoint.totals.settled() < opened:
        raise JobError(
            f"--limit {limit}: {plural(opened, 'row')} {are(opened)} already started; use at least "
            f"--limit {opened}, or leave it out"
        )


def _opened_rows(checkpoint: Checkpoint, known: Manifest) -> int:
    """The rows of chunks that were opened."""
    chunks = checkpoint.chunks()
    return chunks[-1].end_row - known.first_row if chunks else 0


def _plan(
    job: Job,
    manifest: Manifest,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    known: dict[str, PriceTable | None],
    limit: int | None,
    today: str,
    *,
    resumed: bool,
) -> Plan:
    types = None if manifest.types is None else ColumnTypes.from_json(manifest.types)
    tables = {
        model: known.get(model)
        if known.get(model) and model not in job.pricing
        else lookup.resolve_for_all(model, job.pricing, today, [each.url for each in job.endpoints])
        for model in (*manifest.models, *(way.request.model for way in ways[1:] if way.request.model is not None))
    }
    preconditions.require_budget(job, manifest.max_request, tables)
    rows = manifest.rows if limit is None else min(limit, manifest.rows)
    return Plan(
        manifest,
        rows,
        ways,
        variant,
        resumed,
        source,
        types,
        input_pass.schema_of(source, manifest),
        manifest.answer_column,
        tables,
    )


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
