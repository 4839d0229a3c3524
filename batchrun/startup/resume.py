"""Plans a start before its first request: a new run, or one to resume.

A run's manifest is fixed when the run first starts: its requests, its input and the shape of its output. Later starts
are compared with it. Limits, prices, retries and the budget may change from start to start.
"""

import uuid
from datetime import datetime

import msgspec
import pyarrow as pa

from batchrun.errors import ANOTHER, CheckpointError, JobError
from batchrun.job.job import Job
from batchrun.limits import daily
from batchrun.price_list import lookup
from batchrun.row_status import failing
from batchrun.source import Source, fingerprint
from batchrun.startup import adopt, input_pass, preconditions, previous_run, stdin_copy, unsent_rows
from batchrun.startup import shard as shards
from batchrun.startup.answer_match import Questions
from batchrun.startup.estimate import estimate
from batchrun.startup.run_options import RunOptions, Start
from batchrun.store import origins, price_tables, variants
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import InputShare, Manifest
from batchrun.store.origins import Origins
from batchrun.store.price_tables import Tables
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant

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
    schema: pa.Schema
    prices: Tables
    origins: Origins | None = None


def plan_start(job: Job, directory: RunDirectory, checkpoint: Checkpoint, options: RunOptions, now: datetime) -> Plan:
    """Plans this start. A first start reads and checks the whole input and stores the manifest.

    Raises:
        JobError, InputError: something is invalid or has changed; nothing was sent.
    """
    start = Start(job, directory, checkpoint, options)
    entries, today = checkpoint.manifest_entries(), now.astimezone().date().isoformat()
    if Manifest.ENTRY in entries:
        return _resume(start, entries, today)
    if options.retry is not None:
        raise JobError(
            f"{directory.path}: no run was started here, so no rows can be retried; name its directory with -o, or its "
            "day with --date"
        )
    for path in (directory.completions, directory.inflight, *directory.parts.iterdir()):
        if path.exists():  # a run that lost its checkpoint must not be overwritten and paid for again
            raise CheckpointError(
                f"{path} belongs to a run whose checkpoint.db is missing or empty; keep a copy, and {ANOTHER}"
            )
    paths = input_pass.input_files(job, directory, options, started=False)
    files = fingerprint(paths)
    skip = options.skip_invalid
    part = shards.find_input(job, paths, options.shard, directory.path, options.checked, skip_invalid=skip)
    source, share = part.source, None
    if options.shard is not None and part.span is not None:
        share = InputShare(options.shard, part.span, tuple(sorted(map(str, failing(job.finish)))))
    with Questions(directory.path) as keys, Questions(directory.path) as pictures:
        found = input_pass.check(source, part.job, directory, options, keys.add, pictures.add)
        found = msgspec.structs.replace(found, types=part.types or found.types)
        run_id = uuid.uuid4().hex[:12]
        new = input_pass.manifest_of(job, source, files, found, run_id=run_id, created_at=now, share=share)
        input_pass.keep_digests(job, directory, new.layout, pictures, found)
        made = unsent_rows.find_unsent(start, new, keys.rows(found.rejected), options.note)
    ways = (variants.of_job(job),)
    prices, schema = _prices(job, new, ways, {}, today), input_pass.schema_of(source, new)
    before = previous_run.newest_means(job, besides=directory.path)
    to_send = found.rows if made is None else made.new
    expected = estimate(found, job, prices, to_send, None, daily.left_s(now), before)
    expected = msgspec.structs.replace(expected, rows=found.rows)  # those that are not sent cost nothing
    new = msgspec.structs.replace(new, estimate=expected)
    entries = new.encode() | price_tables.encode(prices) | variants.encode(ways) | origins.encode(made)
    checkpoint.write_manifest(entries)
    rows = new.rows if options.limit is None else min(options.limit, new.rows)
    return Plan(new, rows, ways, 0, resumed=False, source=source, schema=schema, prices=prices, origins=made)


def require_same_shape(job: Job, known: Manifest) -> None:
    """Returns if the job wants the output in the shape that this run has.

    Raises:
        JobError: a setting differs; the message says which, and what to do.
    """
    for name in SHAPE:
        if getattr(job.output, name) != getattr(known.output, name):
            raise JobError(f"output.{name} can't change within a run; restore it to resume, or {ANOTHER}")


def _resume(start: Start, entries: dict[str, str], today: str) -> Plan:
    job, directory, checkpoint, options = start.job, start.directory, start.checkpoint, start.options
    known, ways = Manifest.decode(entries), variants.decode(entries)
    shards.require_same(options.shard, known, directory.path)
    require_same_shape(job, known)
    stdin_copy.restore_unless_accepted(directory, known)
    files = stdin_copy.put_in_place(input_pass.input_files(job, directory, options), directory)
    try:
        known, ways, variant, source = adopt.adopt_changes(start, known, ways, files)
        made = unsent_rows.stored_or_found(start, known, source)
    finally:  # other rows that were not accepted must not stay in the place of the run's own
        stdin_copy.restore_unless_accepted(directory, Manifest.decode(checkpoint.manifest_entries()))
    prices_known = price_tables.decode(entries)
    prices, schema = _prices(job, known, ways, prices_known, today), input_pass.schema_of(source, known)
    if prices != prices_known:
        checkpoint.write_manifest(price_tables.encode(prices))
    rows = known.rows if options.limit is None else min(max(options.limit, start.opened_rows(known)), known.rows)
    return Plan(known, rows, ways, variant, resumed=True, source=source, schema=schema, prices=prices, origins=made)


def _prices(job: Job, manifest: Manifest, ways: tuple[Variant, ...], known: Tables, today: str) -> Tables:
    """The price of every model, with which the budget can be kept. A price that is `known` holds for the whole run,
    unless the job states one.

    Raises:
        JobError: as `preconditions.require_budget`.
    """
    tables = {
        model: known.get(model)
        if known.get(model) and model not in job.pricing
        else lookup.resolve_for_all(model, job, today)
        for model in (*manifest.models, *(way.request.model for way in ways[1:] if way.request.model is not None))
    }
    preconditions.require_budget(job, manifest.max_request, tables)
    return tables
