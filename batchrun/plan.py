"""What a start finds and settles before the first request: a new run, one to go on with, or a finished one.

A run's facts are fixed when it first starts and kept in the manifest: which questions, over which input, in which
shape. Later starts are held against them; limits, prices, retries and the budget may change from start to start.
"""

import hashlib
import os
import uuid
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa

from batchrun import prices, variants
from batchrun.check import Problem, Survey, survey
from batchrun.checkpoint import Checkpoint
from batchrun.durable import READ_BYTES, fsync, told
from batchrun.errors import CheckpointError, InputError, JobError
from batchrun.job import Job, Output
from batchrun.json_columns import ColumnTypes
from batchrun.output import output_schema
from batchrun.prices import PriceTable
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
    spool,
)
from batchrun.variants import Variant

SHAPE = ("columns", "prefix", "raw", "layout", "compression", "chunk_rows", "chunk_bytes")
"""The output settings that a run keeps from its first start: its parts are written by them."""


NOTHING = hashlib.blake2b(digest_size=16).hexdigest()
"""The digest of an empty input."""


class Facts(msgspec.Struct, frozen=True):
    """What is fixed when a run first starts. `types` are the column types of JSONL input, as JSON."""

    run_id: str
    begun_at: datetime
    job: str
    dialect: str
    files: tuple[FileIdentity, ...]
    digests: tuple[str, ...]
    rows: int
    rejected: tuple[int, ...]
    types: str | None
    models: dict[str, int]
    max_request: dict[str, tuple[int, int]]
    output: Output


class Plan(msgspec.Struct, frozen=True):
    """Everything a run works by. `prices` holds None for a model whose price nobody knows.

    `variants[k]` is how rows of variant k are asked, 0 as the run began; `variant` is the one that this start's job is.
    """

    facts: Facts
    variants: tuple[Variant, ...]
    variant: int
    resumed: bool
    source: Source
    types: ColumnTypes | None
    schema: pa.Schema
    prices: dict[str, PriceTable | None]


class Asked(msgspec.Struct, frozen=True):
    """What the user asked of this start beyond the job. `stdin` is read where the input is "-".

    `retry`: the statuses whose rows are to be asked again once every row is settled; None: no row is.
    """

    skip_invalid: bool = False
    retry: frozenset[str] | None = None
    stdin: BinaryIO | None = None
    problem: Callable[[str], None] = lambda line: None
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
    found = _survey(source, job, directory, asked)
    facts = Facts(
        run_id=uuid.uuid4().hex[:12],
        begun_at=now,
        job=job.name,
        dialect=found.dialect,
        files=files,
        digests=tuple(digest(file) for file in source.files),
        rows=found.rows,
        rejected=tuple(found.rejected),
        types=None if found.types is None else found.types.to_json(),
        models=found.models,
        max_request=found.max_request,
        output=job.output,
    )
    if (what := changed(source.files, files)) is not None:
        raise InputError(f"the input changed while it was read: {what}; run again when it is at rest")
    ways = (variants.of_job(job),)
    plan = _plan(job, facts, ways, 0, source, {}, today, resumed=False)
    checkpoint.write_manifest({"facts": _encode(facts), "prices": _encode(plan.prices), **variants.encode(ways)})
    return plan


def _require_unused(directory: RunDirectory) -> None:
    """Nothing, if no run has begun here: one that lost its checkpoint must not be overwritten and paid again."""
    for path in (directory.completions, directory.inflight, *directory.parts.iterdir()):
        if path.exists():
            raise CheckpointError(
                f"{path} is of a run whose checkpoint.db is gone or empty; keep a copy, and start another with --new"
            )


def input_files(job: Job, directory: RunDirectory, asked: Asked, *, begun: bool = True) -> tuple[Path, ...]:
    """The files of the input. Standard input is spooled into the run directory: a resume must read it again."""
    if job.input.path is None:
        raise JobError("input.path: name the input in the job or with -i")
    if job.input.path != "-":
        return find_files(job.input.path)
    if asked.stdin is not None and not asked.stdin.isatty():
        _spool(asked.stdin, directory.spool, begun)
    if not directory.spool.exists():
        raise InputError("standard input is a terminal; pipe JSON lines into it, or name a file with -i")
    return (directory.spool,)


def _spool(stream: BinaryIO, to: Path, begun: bool) -> None:
    """Standard input is in `to`. On a resume it may be empty, or the same again; anything else is a change.

    A start that has not begun takes what it is given, and what an earlier one left only if that is nothing.
    """
    if begun and to.exists():
        given = hashlib.blake2b(digest_size=16)
        while block := stream.read(READ_BYTES):
            given.update(block)
        if given.hexdigest() not in (NOTHING, digest(to)):
            raise InputError("standard input is not what this run began with; start another with --new")
        return
    given_now = to.with_name(to.name + ".new")
    spool(stream, given_now)
    if given_now.stat().st_size or not to.exists():
        given_now.replace(to)
    else:
        given_now.unlink()


def require_same_shape(job: Job, facts: Facts) -> None:
    """Nothing, if the job wants this run's output in the shape that it has.

    Raises:
        JobError: names what changed, and the ways on.
    """
    for name in SHAPE:
        if getattr(job.output, name) != getattr(facts.output, name):
            raise JobError(
                f"output.{name} can't change within a run; put it back to go on, or start another with --new"
            )


def require_same_input(files: tuple[Path, ...], facts: Facts) -> None:
    """Nothing, if the files are those the run began with, by identity or else by content.

    Raises:
        InputError: names the first file that is not.
    """
    what = changed(files, facts.files)
    if what is None or tuple(digest(file) for file in files) == facts.digests:
        return
    raise InputError(f"the input changed: {what}; put it back to go on, or start another run with --new")


def facts_of(manifest: dict[str, str]) -> Facts:
    """The facts in a manifest."""
    try:
        return msgspec.json.decode(manifest["facts"], type=Facts)
    except (KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"the run's manifest can't be read: {error}; keep a copy of this directory") from error


def _resume(
    job: Job, directory: RunDirectory, checkpoint: Checkpoint, asked: Asked, manifest: dict[str, str], today: str
) -> Plan:
    facts = facts_of(manifest)
    ways, variant = variants.choose(job, variants.read(manifest), retrying=asked.retry is not None)
    require_same_shape(job, facts)
    files = input_files(job, directory, asked)
    identities = fingerprint(files)  # before the content is read: what changes meanwhile is noticed later
    require_same_input(files, facts)
    known = msgspec.json.decode(manifest.get("prices", "{}"), type=dict[str, PriceTable | None])
    facts = msgspec.structs.replace(facts, files=identities)
    source = open_source(files, job.input.max_line_bytes)
    plan = _plan(job, facts, ways, variant, source, known, today, resumed=True)
    if plan.prices != known:
        checkpoint.write_manifest({"prices": _encode(plan.prices)})
    return plan


def _plan(
    job: Job,
    facts: Facts,
    ways: tuple[Variant, ...],
    variant: int,
    source: Source,
    known: dict[str, PriceTable | None],
    today: str,
    *,
    resumed: bool,
) -> Plan:
    types = None if facts.types is None else ColumnTypes.from_json(facts.types)
    tables = {
        model: known.get(model) if known.get(model) and model not in job.pricing else _price(model, job, today)
        for model in (*facts.models, *(way.request.model for way in ways[1:] if way.request.model is not None))
    }
    _check_budget(job, facts, tables)
    input_schema = source.schema if isinstance(source, ParquetSource) else (types or ColumnTypes()).schema()
    return Plan(facts, ways, variant, resumed, source, types, output_schema(input_schema, facts.output), tables)


def _price(model: str, job: Job, today: str) -> PriceTable | None:
    return prices.resolve(model, job.pricing, today)


def _check_budget(job: Job, facts: Facts, tables: dict[str, PriceTable | None]) -> None:
    """A cap must be keepable: every price known, and room for the largest single request."""
    cap = job.budget.max_cost_usd
    if cap is None:
        return
    for model, table in tables.items():
        if table is None:
            raise JobError(
                f"budget.max_cost_usd: the price of {model} is unknown, so a cap can't be kept; "
                f'give it in [pricing."{model}"] or remove the cap'
            )
        bound = prices.upper_bound(*facts.max_request.get(model, (0, 0)), table) or Decimal(0)
        if bound > cap:
            raise JobError(
                f"budget.max_cost_usd: ${cap} is less than the largest request may cost (${bound:.4f}, by its "
                "upper bound); set request.max_tokens, or raise the cap"
            )


def _survey(source: Source, job: Job, directory: RunDirectory, asked: Asked) -> Survey:
    """The input, read once; problems end the start unless they are to be set aside in rejects.jsonl."""
    rejects = directory.rejects
    with told(rejects):
        rejects.unlink(missing_ok=True)

    def keep(problem: Problem) -> None:
        if asked.skip_invalid:
            with told(rejects), open(os.open(rejects, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
                file.write(msgspec.json.encode(problem, enc_hook=str) + b"\n")

    found = survey(source, job, directory.path, keep=keep, progress=asked.checked)
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
    raise InputError(
        f"{count:,} of {count + found.rows:,} input records can't be asked{shown}. "
        "Mend them, or set them aside with --skip-invalid"
    )


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
