"""What a start finds and settles before the first request: a new run, one to go on with, or a finished one.

A run's facts are fixed when it first starts and kept in the manifest: which questions, over which input, in which
shape. Later starts are held against them; limits, prices, retries and the budget may change from start to start.
"""

import os
import uuid
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa

from batchrun import prices
from batchrun.checkpoint import facts, variants
from batchrun.checkpoint.checkpoint import Checkpoint
from batchrun.checkpoint.facts import Facts
from batchrun.checkpoint.variants import Variant
from batchrun.columns.jsonl import ColumnTypes
from batchrun.columns.schema import Column
from batchrun.durable import fsync, told
from batchrun.errors import CheckpointError, InputError, JobError
from batchrun.gate.deadline import Deadline
from batchrun.job.job import Job
from batchrun.output.rows import output_schema
from batchrun.plan import drift, spooled
from batchrun.plan.check import Problem, Survey, survey
from batchrun.plan.matching import Questions
from batchrun.prices import PriceTable
from batchrun.request import image_digests
from batchrun.rundir import RunDirectory
from batchrun.source import (
    FileIdentity,
    ParquetSource,
    Source,
    changed,
    digest,
    find_files,
    fingerprint,
    open_source,
)

SHAPE = ("columns", "prefix", "raw", "layout", "compression", "chunk_rows", "chunk_bytes")
"""The output settings that a run keeps from its first start: its parts are written by them."""


class Plan(msgspec.Struct, frozen=True):
    """Everything a run works by. `prices` holds None for a model whose price nobody knows.

    `rows` are those that this start is to settle: all, or the first so many. `variants[k]` is how rows of variant k are
    asked, 0 as the run began; `variant` is the one that this start's job is.
    """

    facts: Facts
    rows: int
    variants: tuple[Variant, ...]
    variant: int
    resumed: bool
    source: Source
    types: ColumnTypes | None
    schema: pa.Schema
    parsed: Column
    prices: dict[str, PriceTable | None]


class Asked(msgspec.Struct, frozen=True):
    """What the user asked of this start beyond the job. `stdin` is read where the input is "-"; `only_look` takes no
    change, not even a harmless one.

    `limit`: only the first so many rows, a pilot that a later start without it goes on with. `retry`: the statuses
    whose rows are to be asked again once every row is settled; None: no row is.
    """

    skip_invalid: bool = False
    accept_changes: bool = False
    only_look: bool = False
    limit: int | None = None
    deadline: Deadline | None = None
    retry: frozenset[str] | None = None
    stdin: BinaryIO | None = None
    problem: Callable[[str], None] = lambda line: None
    told: Callable[[str], None] = lambda line: None
    checked: Callable[[int], None] = lambda rows: None


def make(job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: Asked, now: datetime) -> Plan:
    """The plan of this start; on a first start everything is read and checked, and the facts are durable.

    Raises:
        JobError, InputError: something is wrong or has changed; nothing was sent.
    """
    manifest, today = checkpoint.manifest(), now.astimezone().date().isoformat()
    if "facts" in manifest:
        return _resume(job, directory, checkpoint, asked, manifest, today)
    _require_unused(directory)
    source = open_source(input_files(job, directory, asked, begun=False), job.input.max_line_bytes)
    files = fingerprint(source.files)
    with Questions(directory.path) as pictures:
        found = _survey(source, job, directory, asked, pictured=pictures.add)
        new = _new_facts(job, source, files, found, run_id=uuid.uuid4().hex[:12], begun_at=now)
        _keep_digests(job, directory, new.layout, pictures, found)
    ways = (variants.of_job(job),)
    plan = _plan(job, new, ways, 0, source, {}, asked.limit, today, resumed=False)
    checkpoint.write_manifest({**facts.encode(new), "prices": _encode(plan.prices), **variants.encode(ways)})
    return plan


def _new_facts(
    job: Job, source: Source, files: tuple[FileIdentity, ...], found: Survey, *, run_id: str, begun_at: datetime
) -> Facts:
    """The facts of a run over this input; it must not have changed since `files` was taken."""
    digests = tuple(digest(file) for file in source.files)
    if (what := changed(source.files, files)) is not None:
        raise InputError(f"the input changed while it was read: {what}; run again when it is at rest")
    return Facts(
        run_id=run_id,
        begun_at=begun_at,
        job=job.name,
        dialect=found.dialect,
        files=files,
        digests=digests,
        rows=found.rows,
        rejected=tuple(found.rejected),
        types=None if found.types is None else found.types.to_json(),
        answer_schema=found.answer_schema,
        models=found.models,
        max_request=found.max_request,
        output=job.output,
    )


def _require_unused(directory: RunDirectory) -> None:
    """Nothing, if no run has begun here: one that lost its checkpoint must not be overwritten and paid again."""
    for path in (directory.completions, directory.inflight, *directory.parts.iterdir()):
        if path.exists():
            raise CheckpointError(
                f"{path} is of a run whose checkpoint.db is gone or empty; keep a copy, and start another with --new"
            )


def input_files(job: Job, directory: RunDirectory, asked: Asked, *, begun: bool = True) -> tuple[Path, ...]:
    """The files of the input. Standard input, and a program's rows, are kept in the run directory (`spooled`)."""
    if job.input.path is None:
        raise JobError("input.path: name the input in the job or with -i")
    if job.input.path != "-":
        return find_files(job.input.path)
    if asked.stdin is not None and not asked.stdin.isatty():
        return (spooled.take(asked.stdin, directory, begun=begun),)
    if not directory.spool.exists():
        raise InputError("standard input is a terminal; pipe JSON lines into it, or name a file with -i")
    return (directory.spool,)


def require_same_shape(job: Job, known: Facts) -> None:
    """Nothing, if the job wants this run's output in the shape that it has.

    Raises:
        JobError: names what changed, and the ways on.
    """
    for name in SHAPE:
        if getattr(job.output, name) != getattr(known.output, name):
            raise JobError(
                f"output.{name} can't change within a run; put it back to go on, or start another with --new"
            )


def changed_input(files: tuple[Path, ...], known: Facts) -> str | None:
    """What is not as the run knows its input, by identity and then by content; None where it is the same."""
    what = changed(files, known.files)
    return None if what is None or tuple(digest(file) for file in files) == known.digests else f"the input: {what}"


def _resume(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: Asked, manifest: dict[str, str], today: str
) -> Plan:
    known, ways = facts.read(manifest), variants.read(manifest)
    require_same_shape(job, known)
    spooled.settle(directory, known)
    files = spooled.put_in_place(input_files(job, directory, asked), directory)
    try:
        known, ways, variant, source = _as_it_is_now(job, directory, checkpoint, asked, known, ways, files)
    finally:
        spooled.settle(directory, facts.read(checkpoint.manifest()))
    prices_known = msgspec.json.decode(manifest.get("prices", "{}"), type=dict[str, PriceTable | None])
    limit = None if asked.limit is None else max(asked.limit, _begun_rows(checkpoint))
    plan = _plan(job, known, ways, variant, source, prices_known, limit, today, resumed=True)
    if plan.prices != prices_known:
        checkpoint.write_manifest({"prices": _encode(plan.prices)})
    return plan


def _as_it_is_now(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    asked: Asked,
    known: Facts,
    ways: tuple[Variant, ...],
    files: tuple[Path, ...],
) -> tuple[Facts, tuple[Variant, ...], int, Source]:
    """The run's facts, the ways it asks, this start's among them, and the source: as known, or as changes are adopted.

    Raises:
        JobError: something changed that the user does not accept.
    """
    identities = fingerprint(files)  # before the content is read: what changes meanwhile is noticed later
    ways, variant, settings = variants.place(job, ways, known.variant, retrying=asked.retry is not None)
    what = changed_input(files, known)
    what = None if what is None else what.replace(str(directory.spool), "standard input")
    source = open_source(files, job.input.max_line_bytes)
    if what is None and asked.accept_changes and job.input.image_root is not None:
        what = "the images"
    if settings or what is not None:
        reasons = (*settings, *([what] if what else []))
        known = _adopt(job, directory, checkpoint, asked, known, ways, variant, source, identities, reasons)
    else:
        _require_limit_in_time(asked.limit, checkpoint)
        known = msgspec.structs.replace(known, files=identities)
    return known, ways, variant, source


def _adopt(
    job: Job,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    asked: Asked,
    known: Facts,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    identities: tuple[FileIdentity, ...],
    reasons: tuple[str, ...],
) -> Facts:
    """The facts of the run over the changed input or job, laid out anew, if the user accepts that or nothing is lost.

    Raises:
        JobError: what changed, and what it would cost; nothing was sent or given up.
    """
    with Questions(directory.path) as questions, Questions(directory.path) as pictures:
        found = _survey(source, job, directory, asked, questions.add, pictures.add)
        new = _new_facts(job, source, identities, found, run_id=known.run_id, begun_at=known.begun_at)
        new = msgspec.structs.replace(new, layout=known.layout + 1, variant=variant, dialect=found.dialect)
        answers = drift.Answers(directory, checkpoint, known)
        asked_now = questions.rows(found.rejected)
        cost_usd = checkpoint.spent.cost_usd()
        seen, matches = drift.examine(answers, asked_now, found.rows, reasons, cost_usd, directory.path)
        with matches:
            if asked.only_look or not (seen.harmless or asked.accept_changes):
                ways_on = "Go on with --accept-changes, put it back, or start another run with --new"
                raise ChangedError(f"{seen}. {ways_on}", seen)
            asked.told(str(seen))
            schema = _schema(source, new)
            entries = {**facts.encode(new), **variants.encode(ways)}
            _keep_digests(job, directory, new.layout, pictures, found)
            drift.lay_out(answers, matches, source, new, schema, directory, checkpoint, entries, asked.limit)
            directory.images_of(known.layout).unlink(missing_ok=True)
    return new


def _keep_digests(job: Job, directory: RunDirectory, layout: int, pictures: Questions, found: Survey) -> None:
    """What the rows' images are is on disk, if they can change behind the input's back: as files of their own."""
    if job.input.image_root is not None:
        image_digests.write(directory.images_of(layout), pictures.rows(found.rejected))


class ChangedError(JobError):
    """The input or the job is not what the run began with, and answers would be given up or moved; `drift` says how."""

    def __init__(self, message: str, drift: drift.Drift) -> None:
        super().__init__(message)
        self.drift = drift


def _schema(source: Source, known: Facts) -> pa.Schema:
    types = ColumnTypes() if known.types is None else ColumnTypes.from_json(known.types)
    return output_schema(
        source.schema if isinstance(source, ParquetSource) else types.schema(), known.output, facts.parsed(known)
    )


def require_columns(job: Job, source: Source, found: Survey | None = None) -> None:
    """Nothing, if the output can have the input's columns: Parquet knows them at once, JSON lines once it was `found`.

    Raises:
        JobError: as `output_schema`.
    """
    if isinstance(source, ParquetSource):
        output_schema(source.schema, job.output)
    elif found is not None and found.types is not None:
        output_schema(found.types.schema(), job.output)


def _require_limit_in_time(limit: int | None, checkpoint: Checkpoint) -> None:
    """Nothing, unless rows behind the limit are begun and pending: an open chunk is asked whole, or not at all."""
    begun = _begun_rows(checkpoint)
    if limit is not None and limit < begun and checkpoint.spent.settled() < begun:
        raise JobError(
            f"--limit {limit}: {begun:,} rows are begun already; say at least --limit {begun}, or leave it out"
        )


def _begun_rows(checkpoint: Checkpoint) -> int:
    """The rows of chunks that were opened."""
    chunks = checkpoint.chunks()
    return chunks[-1].end_row if chunks else 0


def _plan(
    job: Job,
    facts_: Facts,
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
    _check_budget(job, facts_, tables)
    rows = facts_.rows if limit is None else min(limit, facts_.rows)
    return Plan(
        facts_, rows, ways, variant, resumed, source, types, _schema(source, facts_), facts.parsed(facts_), tables
    )


def _price(model: str, job: Job, today: str) -> PriceTable | None:
    return prices.resolve(model, job.pricing, today)


def _check_budget(job: Job, known: Facts, tables: dict[str, PriceTable | None]) -> None:
    """A cap must be keepable: every price known, and room for the largest single request."""
    cap, most = job.budget.max_cost_usd, job.budget.max_tokens
    largest = max(map(sum, known.max_request.values()), default=0)
    if most is not None and largest > most:
        raise JobError(
            f"budget.max_tokens: {most:,} are fewer than the largest request may use ({largest:,}, by its upper "
            "bound); set request.max_tokens, or raise the cap"
        )
    if cap is None:
        return
    for model, table in tables.items():
        if table is None:
            raise JobError(
                f"budget.max_cost_usd: the price of {model} is unknown, so a cap can't be kept; "
                f'give it in [pricing."{model}"] or remove the cap'
            )
        bound = prices.upper_bound(*known.max_request.get(model, (0, 0)), table) or Decimal(0)
        if bound > cap:
            raise JobError(
                f"budget.max_cost_usd: ${cap} is less than the largest request may cost (${bound:.4f}, by its "
                "upper bound); set request.max_tokens, or raise the cap"
            )


def _survey(
    source: Source,
    job: Job,
    directory: RunDirectory,
    asked: Asked,
    question: Callable[[int, bytes], None] = lambda ordinal, key: None,
    pictured: Callable[[int, bytes], None] = lambda ordinal, digest: None,
) -> Survey:
    """The input, read once; problems end the start unless they are to be set aside in rejects.jsonl."""
    rejects = directory.rejects
    with told(rejects):
        rejects.unlink(missing_ok=True)

    def keep(problem: Problem) -> None:
        if asked.skip_invalid:
            with told(rejects), open(os.open(rejects, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
                file.write(msgspec.json.encode(problem, enc_hook=str) + b"\n")

    require_columns(job, source)
    found = survey(source, job, directory.path, keep=keep, progress=asked.checked, question=question, pictured=pictured)
    if found.rejected and not asked.skip_invalid:
        raise_problems(found, asked.problem)
    if found.rejected:
        with told(rejects):
            fsync(rejects)
    return found


def raise_problems(found: Survey, tell: Callable[[str], None]) -> None:
    """Tells the first problems line by line, then raises with their count.

    Raises:
        InputError: always.
    """
    for problem in found.first_problems:
        tell(str(problem))
    count = len(found.rejected)
    shown = f"; the first {len(found.first_problems)} are above" if count > len(found.first_problems) else ""
    if not found.rows:
        raise InputError(
            f"none of the input records ({count:,}) can be asked{shown}. "
            "The job (its template, input.id, input.dialect) does not fit this input: mend one of the two"
        )
    raise InputError(
        f"{count:,} of {count + found.rows:,} input records can't be asked{shown}. "
        "Mend them, or set them aside with batchrun run ... --skip-invalid"
    )


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
