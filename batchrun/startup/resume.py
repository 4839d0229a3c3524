"""What a start finds and settles before the first request: a new run, one to go on with, or a finished one.

A run's facts are fixed when it first starts and kept in the manifest: which questions, over which input, in which
shape. Later starts are held against them; limits, prices, retries and the budget may change from start to start.
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
from batchrun.prices import PriceTable
from batchrun.report.cost_lines import scaled
from batchrun.report.wording import are, plural
from batchrun.source import FileIdentity, Source, changed, digest, fingerprint, open_source
from batchrun.startup import carry, changes, input_pass, preconditions, previous_run, stdin_copy
from batchrun.startup.answer_match import NONE, Questions
from batchrun.startup.estimate import estimate
from batchrun.startup.run_options import RunOptions
from batchrun.store import manifest, origins, variants
from batchrun.store.carry_over import CarryOver
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.manifest import Manifest
from batchrun.store.origins import Origins
from batchrun.store.rundir import RunDirectory
from batchrun.store.variants import Variant
from batchrun.tables.arrow_types import Column
from batchrun.tables.json_columns import ColumnTypes

SHAPE = ("columns", "prefix", "raw", "layout", "compression", "chunk_rows", "chunk_bytes")
"""The output settings that a run keeps from its first start: its parts are written by them."""


class Plan(msgspec.Struct, frozen=True):
    """Everything a run works by. `prices` holds None for a model whose price nobody knows.

    `rows` are those that this start is to settle: all, or the first so many. `variants[k]` is how rows of variant k are
    asked, 0 as the run began; `variant` is the one that this start's job is. `origins` says which rows are not sent.
    """

    facts: Manifest
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


def make(job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: RunOptions, now: datetime) -> Plan:
    """The plan of this start; on a first start everything is read and checked, and the facts are durable.

    Raises:
        JobError, InputError: something is wrong or has changed; nothing was sent.
    """
    entries, today = checkpoint.manifest_entries(), now.astimezone().date().isoformat()
    if "facts" in entries:
        return _resume(job, directory, checkpoint, asked, entries, today)
    if asked.retry is not None:
        raise JobError(
            f"{directory.path}: no run has begun here whose rows could be asked again; name its directory with -o, or "
            "its day with --date"
        )
    _require_unused(directory)
    source = open_source(input_pass.input_files(job, directory, asked, begun=False), job.input.max_line_bytes)
    files = fingerprint(source.files)
    with Questions(directory.path) as keys, Questions(directory.path) as pictures:
        found = input_pass.read(source, job, directory, asked, keys.add, pictures.add)
        new = input_pass.facts_of(job, source, files, found, run_id=uuid.uuid4().hex[:12], begun_at=now)
        input_pass.keep_digests(job, directory, new.layout, pictures, found)
        made = _origins(job, directory, new, asked, keys.rows(found.rejected))
    ways = (variants.of_job(job),)
    plan = _plan(job, new, ways, 0, source, {}, asked.limit, today, resumed=False)
    before = previous_run.newest(job, besides=directory.path)
    to_send = found.rows if made is None else made.new
    expected = estimate(found, job, plan.prices, to_send, None, daily.left_s(now), before)
    expected = msgspec.structs.replace(expected, rows=found.rows)  # those that are not sent cost nothing
    plan = msgspec.structs.replace(plan, facts=msgspec.structs.replace(new, estimate=expected), origins=made)
    entries = {**manifest.encode(plan.facts), "prices": _encode(plan.prices), **variants.encode(ways)}
    checkpoint.write_manifest({**entries, origins.ENTRY: _encode(made)})
    return plan


def _origins(
    job: Job, directory: RunDirectory, facts: Manifest, asked: RunOptions, keys: Iterable[tuple[bytes, int]]
) -> Origins | None:
    """Which of the rows, whose keys these are, take an answer without a request; None where the job wants all sent."""
    wanted = carry.wanted(job, facts.rows, facts.layout)
    if wanted is None:
        return None
    made = carry.make(job, keys, wanted, directory.path, directory.origins_of(facts.layout), asked.told)
    if (line := carry.in_words(made)) is not None:
        asked.told(line)
    return made


def _require_unused(directory: RunDirectory) -> None:
    """Nothing, if no run has begun here: one that lost its checkpoint must not be overwritten and paid again."""
    for path in (directory.completions, directory.inflight, *directory.parts.iterdir()):
        if path.exists():
            raise CheckpointError(
                f"{path} is of a run whose checkpoint.db is gone or empty; keep a copy, and {ANOTHER}"
            )


def require_same_shape(job: Job, known: Manifest) -> None:
    """Nothing, if the job wants this run's output in the shape that it has.

    Raises:
        JobError: names what changed, and the ways on.
    """
    for name in SHAPE:
        if getattr(job.output, name) != getattr(known.output, name):
            raise JobError(f"output.{name} can't change within a run; put it back to go on, or {ANOTHER}")


def changed_input(files: tuple[Path, ...], directory: RunDirectory, known: Manifest) -> str | None:
    """What is not as the run knows its input, by identity and then by content; None where it is the same."""
    what = changed(files, known.files)
    if what is None or tuple(digest(file) for file in files) == known.digests:
        return None
    return "standard input has other rows" if files == (directory.spool,) else f"the input: {what}"


def _resume(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: RunOptions, entries: dict[str, str], today: str
) -> Plan:
    known, ways = manifest.decode(entries), variants.decode(entries)
    require_same_shape(job, known)
    stdin_copy.settle(directory, known)
    files = stdin_copy.put_in_place(input_pass.input_files(job, directory, asked), directory)
    try:
        known, ways, variant, source = _as_it_is_now(job, directory, checkpoint, asked, known, ways, files)
        made = _origins_now(job, directory, checkpoint, asked, known, source)
    finally:
        stdin_copy.settle(directory, manifest.decode(checkpoint.manifest_entries()))
    prices_known = msgspec.json.decode(entries.get("prices", "{}"), type=dict[str, PriceTable | None])
    limit = None if asked.limit is None else max(asked.limit, _begun_rows(checkpoint))
    plan = _plan(job, known, ways, variant, source, prices_known, limit, today, resumed=True)
    if plan.prices != prices_known:
        checkpoint.write_manifest({"prices": _encode(plan.prices)})
    return msgspec.structs.replace(plan, origins=made)


def _origins_now(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: RunOptions, known: Manifest, source: Source
) -> Origins | None:
    """The origins of the run's rows: as they were found, or found again where the job wants others, or what they were
    made of is gone. That takes the input's keys, so it is read once more.
    """
    entry = checkpoint.manifest_entries().get(origins.ENTRY, "null")
    made = msgspec.json.decode(entry, type=Origins | None)
    path = directory.origins_of(known.layout)
    wanted = carry.wanted(job, known.rows, known.layout)
    if carry.still_holds(made, wanted, path):
        return None if wanted is None else made
    settled, opened = checkpoint.totals.settled(), _begun_rows(checkpoint)
    if asked.only_look or settled == known.rows or (checkpoint.has_reopened and opened == known.rows):
        return None  # no row is left but such as a retry sends
    with Questions(directory.path) as keys:
        found = input_pass.read(source, job, directory, asked, keys.add)
        made = _origins(job, directory, known, asked, keys.rows(found.rejected))
    checkpoint.write_manifest({origins.ENTRY: _encode(made)})
    return made


def _as_it_is_now(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    asked: RunOptions,
    known: Manifest,
    ways: tuple[Variant, ...],
    files: tuple[Path, ...],
) -> tuple[Manifest, tuple[Variant, ...], int, Source]:
    """The run's facts, the ways it asks, this start's among them, and the source: as known, or as changes are adopted.

    Raises:
        JobError: something changed that the user does not accept.
    """
    identities = fingerprint(files)  # before the content is read: what changes meanwhile is noticed later
    ways, variant, settings = variants.place(job, ways, known.variant, retrying=asked.retry is not None)
    what = changed_input(files, directory, known)
    source = open_source(files, job.input.max_line_bytes)
    if what is None and asked.accept_changes and job.input.image_root is not None:
        what = "the images"
    if settings or what is not None:
        reasons = (*settings, *([what] if what else []))
        known = _adopt(job, directory, checkpoint, asked, known, ways, variant, source, identities, reasons, settings)
    else:
        _require_limit_in_time(asked.limit, checkpoint)
        known = msgspec.structs.replace(known, files=identities)
    return known, ways, variant, source


def _adopt(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    asked: RunOptions,
    known: Manifest,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    identities: tuple[FileIdentity, ...],
    reasons: tuple[str, ...],
    settings: tuple[str, ...],
) -> Manifest:
    """The facts of the run over the changed input or job, laid out anew, if the user accepts that or nothing is lost.

    Raises:
        JobError: what changed, and what it would cost; nothing was sent or given up.
    """
    with Questions(directory.path) as questions, Questions(directory.path) as pictures:
        found = input_pass.read(source, job, directory, asked, questions.add, pictures.add)
        new = input_pass.facts_of(job, source, identities, found, run_id=known.run_id, begun_at=known.begun_at)
        expected = None if known.estimate is None else scaled(known.estimate, found.rows)
        new = msgspec.structs.replace(
            new, layout=known.layout + 1, variant=variant, dialect=found.dialect, estimate=expected
        )
        answers = changes.Answers(directory, checkpoint, known)
        asked_now = questions.rows(found.rejected)
        mean_cost_usd = checkpoint.totals.mean_cost_usd()
        seen, matches = changes.examine(answers, asked_now, found.rows, reasons, mean_cost_usd, directory.path)
        with matches, _unless_refused(directory.origins_of(new.layout)):
            silent = msgspec.structs.replace(asked, told=lambda line: None)
            made = _origins(job, directory, new, silent, questions.rows(found.rejected))
            carry_over = CarryOver(made, directory.origins_of(new.layout))
            seen = msgspec.structs.replace(seen, carried=carry_over.count(found.rows, lambda row: matches[row] == NONE))
            _require_consent(job, asked, seen, settings)
            asked.told(str(seen))
            schema = input_pass.schema_of(source, new)
            entries = {**manifest.encode(new), **variants.encode(ways), origins.ENTRY: _encode(made)}
            input_pass.keep_digests(job, directory, new.layout, pictures, found)
            changes.lay_out(
                answers, matches, source, new, schema, directory, checkpoint, entries, asked.limit, carry_over
            )
            for old in (directory.images_of(known.layout), directory.origins_of(known.layout)):
                old.unlink(missing_ok=True)
    return new


@contextlib.contextmanager
def _unless_refused(path: Path) -> Iterator[None]:
    """What the block writes at `path` stays only if the block ends well."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _require_consent(job: Job, asked: RunOptions, seen: changes.Changes, settings: tuple[str, ...]) -> None:
    """Nothing, if the user accepts the change, or it gives up and moves nothing. `settings` of the job have changed.

    Raises:
        ChangedError: the change may not be taken.
    """
    if asked.only_look or not (seen.harmless or asked.accept_changes):
        raise ChangedError(f"{seen}. Go on with --accept-changes, put it back, or {ANOTHER}", seen)
    if seen.harmless:
        return
    if asked.accept_changes == "input" and settings:
        raise ChangedError(
            f"{seen}. --accept-changes=input accepts changed rows and not a changed job ({', '.join(settings)}); "
            f"put it back, go on with --accept-changes, or {ANOTHER}",
            seen,
        )
    bound = job.input.max_changed
    most = seen.before * Decimal(bound[:-1]) / 100 if isinstance(bound, str) else bound
    if most is not None and seen.rows_changed > most:
        raise ChangedError(
            f"{seen}. {plural(seen.rows_changed, 'row')} of {seen.before:,} changed, and input.max_changed = {bound} "
            f"allows {most:,.0f}; see whether the input is whole, raise it, or {ANOTHER}",
            seen,
        )


class ChangedError(JobError):
    """The input or the job is not what the run began with, and answers would be given up or moved; `drift` says how."""

    def __init__(self, message: str, drift: changes.Changes) -> None:
        super().__init__(message)
        self.drift = drift


def _require_limit_in_time(limit: int | None, checkpoint: Checkpoint) -> None:
    """Nothing, unless rows behind the limit are begun and pending: an open chunk is asked whole, or not at all."""
    begun = _begun_rows(checkpoint)
    if limit is not None and limit < begun and checkpoint.totals.settled() < begun:
        raise JobError(
            f"--limit {limit}: {plural(begun, 'row')} {are(begun)} begun already; say at least --limit {begun}, or "
            "leave it out"
        )


def _begun_rows(checkpoint: Checkpoint) -> int:
    """The rows of chunks that were opened."""
    chunks = checkpoint.chunks()
    return chunks[-1].end_row if chunks else 0


def _plan(
    job: Job,
    facts_: Manifest,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    known: dict[str, PriceTable | None],
    limit: int | None,
    today: str,
    *,
    resumed: bool,
) -> Plan:
    types = None if facts_.types is None else ColumnTypes.from_json(facts_.types)
    tables = {
        model: known.get(model) if known.get(model) and model not in job.pricing else _price(model, job, today)
        for model in (*facts_.models, *(way.request.model for way in ways[1:] if way.request.model is not None))
    }
    preconditions.require_budget(job, facts_.max_request, tables)
    rows = facts_.rows if limit is None else min(limit, facts_.rows)
    return Plan(
        facts_,
        rows,
        ways,
        variant,
        resumed,
        source,
        types,
        input_pass.schema_of(source, facts_),
        manifest.answer_column(facts_),
        tables,
    )


def _price(model: str, job: Job, today: str) -> PriceTable | None:
    from batchrun import price_list  # here, because it takes 170 ms

    return price_list.resolve_for_all(model, job.pricing, today, [each.url for each in job.endpoints])


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
