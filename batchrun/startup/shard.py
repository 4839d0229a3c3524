"""Shards: several runs share an input, each over its own range of rows, for the array jobs of a cluster.

`--shard 3/16` is the fourth of 16 runs. Ranges are contiguous and equal to within a row. The job's limits are those of
all shards together, and each gets its part of them.
"""

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

import msgspec

from batchrun.errors import ANOTHER, InputError, JobError
from batchrun.job.job import Job
from batchrun.job.settings import Budget, Endpoint, Limits
from batchrun.report.wording import rounded
from batchrun.request.builder import detect_dialect
from batchrun.run_summary import Shard
from batchrun.source import InputFile, JsonlSource, Source, Span, TableSource, digest, open_source, parquet
from batchrun.source.content import content_of
from batchrun.startup import preconditions
from batchrun.startup.buckets import IdIndex
from batchrun.startup.input_check import PROGRESS_EVERY
from batchrun.store.manifest import Manifest
from batchrun.tables.json_columns import ColumnTypes

MAX_COUNT = 100_000  # Kubernetes allows an Indexed Job no more pods (`completions`)

CENT = Decimal("0.01")

T = TypeVar("T", Limits, Endpoint, Budget)


def parse(text: str) -> Shard:
    """The shard that `--shard K/N` names.

    Raises:
        JobError: the text names none.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None:
        unset = "; the variable before the slash is empty" if text.startswith("/") else ""
        raise JobError(f"--shard {text}: expected K/N, such as 0/16 for the first of 16 shards{unset}")
    number, count = int(found[1]), int(found[2])
    if not 1 <= count <= MAX_COUNT:
        raise JobError(f"--shard {text}: expected 1 to {MAX_COUNT:,} shards")
    if number >= count:
        raise JobError(f"--shard {text}: shards count from 0, so the last of {count} is {count - 1}/{count}")
    return Shard(number, count)


def rows_of(shard: Shard, rows: int) -> tuple[int, int]:
    """The shard's part of `rows` rows: its first row, and one past its last. The first shards may have a row more."""
    each, more = divmod(rows, shard.count)
    first = shard.number * each + min(shard.number, more)
    return first, first + each + (shard.number < more)


# ── the job of a shard ────────────────────────────────────────────────────────────────────────────────────────────────


def divided_job(job: Job, named: str | None, note: Callable[[str], None]) -> tuple[Job, Shard | None]:
    """The job of the shard that `--shard` names, and that shard; the job itself without one. `note` gets its limits.

    Raises:
        JobError: as `read` and `job_of`.
    """
    if named is None:
        return job, None
    shard = parse(named)
    own = job_of(job, shard)
    for line in in_words(job, own, shard):
        note(line)
    return own, shard


def job_of(job: Job, shard: Shard) -> Job:
    """The job with the shard's own run directory and its part of the limits.

    Raises:
        JobError: a limit is too small to be divided.
    """
    path = job.output.path.rstrip("/")
    path = path if path.endswith(shard.suffix) else path + shard.suffix
    job = msgspec.structs.replace(job, output=msgspec.structs.replace(job.output, path=path))
    if job.limits.limits_are == "per_process":
        return job
    endpoints = job.endpoints
    if job.more_endpoints:
        endpoints = [_divided(each, f"endpoint[{place}]", _IN_ENDPOINT, shard) for place, each in enumerate(endpoints)]
    return msgspec.structs.replace(
        job,
        endpoint=endpoints[0],
        more_endpoints=endpoints[1:],
        limits=_divided(job.limits, "limits", _IN_LIMITS, shard),
        budget=_divided(job.budget, "budget", _IN_BUDGET, shard),
    )


_RATES = (
    *("requests_per_minute", "requests_per_day"),
    *("tokens_per_minute", "input_tokens_per_minute", "output_tokens_per_minute"),
)
_IN_LIMITS = ("requests_per_second", *_RATES, "max_in_flight")
_IN_BUDGET = ("max_cost_usd", "per_start_usd", "max_tokens", "max_requests")
_IN_ENDPOINT = ("requests_per_minute", "tokens_per_minute", "max_in_flight")


def _divided(table: T, name: str, settings: tuple[str, ...], shard: Shard) -> T:
    whole = {setting: getattr(table, setting) for setting in settings}
    given = {setting: value for setting, value in whole.items() if value is not None}
    return msgspec.structs.replace(
        table, **{key: portion(value, shard, f"{name}.{key}") for key, value in given.items()}
    )


def portion(whole: float | Decimal, shard: Shard, setting: str) -> float | Decimal:
    """The shard's part of a limit. All parts add up to the whole; the first shards get what does not divide evenly.

    Counts are divided in ones, money in cents or in the last digit that the amount has. Only requests per second may
    be less than one.

    Raises:
        JobError: nothing would be left for the last shards.
    """
    if setting.endswith("requests_per_second"):
        return whole / shard.count
    unit = Decimal(1)
    if isinstance(whole, Decimal):
        exponent = whole.as_tuple().exponent
        unit = min(CENT, Decimal(1).scaleb(exponent if isinstance(exponent, int) else 0))
    units = int(Decimal(whole) / unit)
    if units < shard.count:  # all shards report it, not only the last ones
        least = shard.count * unit
        raise JobError(
            f"{setting}: {whole:,} can't be divided by {shard.count} shards; set it to {least:,f} or more, start fewer "
            'shards, or set limits.limits_are = "per_process" if it is for each of them'
        )
    first, end = rows_of(shard, units)
    return type(whole)((end - first) * unit)


_WORDS = {
    "requests_per_second": "{} of {} requests/s",
    "requests_per_minute": "{} of {} requests/min",
    "requests_per_day": "{} of {} requests/day",
    "tokens_per_minute": "{} of {} tokens/min",
    "input_tokens_per_minute": "{} of {} input tokens/min",
    "output_tokens_per_minute": "{} of {} output tokens/min",
    "max_in_flight": "{} of {} in flight",
    "max_cost_usd": "${} of ${}",
    "per_start_usd": "${} of ${} for each start",
    "max_tokens": "{} of {} tokens in all",
    "max_requests": "{} of {} requests in all",
}


def in_words(whole: Job, own: Job, shard: Shard) -> list[str]:
    """The shard's part of each limit, and the limits that are not divided."""
    if whole.limits.limits_are == "per_process":
        return [f'shard {shard}: each shard has all of the limits, as limits.limits_are = "per_process" says']
    words = []
    for setting, form in _WORDS.items():
        tables = (own.total_limits, whole.total_limits) if setting in _IN_LIMITS else (own.budget, whole.budget)
        given = [getattr(table, setting) for table in tables]
        if given[0] is not None:
            words.append(form.format(*(f"{rounded(value):,}" for value in given)))
    lines = [f"shard {shard}, its part of the limits: {', '.join(words)}"]
    if whole.budget.per_day_usd is not None or whole.budget.per_month_usd is not None:
        lines.append(
            f"shard {shard}: budgets for days and months are not divided: they hold for all runs that share "
            f"{whole.budget.state}, and shards on other machines use another file"
        )
    return lines


# ── its part of the input ─────────────────────────────────────────────────────────────────────────────────────────────


class InputPart(msgspec.Struct, frozen=True):
    """The input of a run: of a shard, its part of it. `job` is the job as its records are read.

    Of a shard, `span` is where it is, and `types` (of JSON lines) are those of the whole input, so that all shards read
    it alike.
    """

    source: Source
    job: Job
    span: Span | None = None
    types: ColumnTypes | None = None


def find_input(
    job: Job,
    files: tuple[InputFile, ...],
    shard: Shard | None,
    scratch: Path,
    progress: Callable[[int], None] = lambda rows: None,
    *,
    skip_invalid: bool = False,
) -> InputPart:
    """The shard's part of the input, all of it without a shard. `scratch` is a directory for ids that don't fit into
    memory.

    Parquet footers say where it is, and the ids are one column. Text has no such index: it is read from end to end to
    count its records, and JSON lines once more, for their ids and the types of their columns.

    Raises:
        InputError: the input can't be read or has too few rows; or an id repeats anywhere in it, unless invalid records
            are skipped: then each shard looks at its own ids.
    """
    whole = open_source(files, job.input.max_line_bytes)
    if shard is None:
        return InputPart(whole, job)
    span = whole.find_span(lambda records: rows_of(shard, records))
    preconditions.require_rows(job, span.records)
    first = next((record for record in whole.records() if record.problem is None), None)
    dialect = job.input.dialect if first is None else detect_dialect(job, first.columns)
    id_column = job.input.id or ("custom_id" if dialect == "openai-batch" else None)
    types = None
    with IdIndex(scratch) as ids:
        if isinstance(whole, JsonlSource):
            types = ColumnTypes()
            for record in whole.records():
                if record.problem is None:
                    types.observe(record.columns)
                    ids.add_id(record.ordinal, record.columns.get(id_column or ""))
                if record.ordinal % PROGRESS_EVERY == 0:
                    progress(record.ordinal)
        elif isinstance(whole, TableSource) and id_column is not None and not skip_invalid:
            for ordinal, value in whole.column(id_column):
                ids.add_id(ordinal, value)
        if not skip_invalid:
            # every shard reports it, not only the one with the record: the others would send their rows for nothing
            repeated = min(ids.duplicates(), default=None)
            if repeated is not None:
                raise InputError(
                    f"{id_column}: record {repeated[0]:,} of the input, counted from 0, has the id of record "
                    f"{repeated[1]:,}; `batchrun check` without --shard names all of these; correct them, or choose "
                    "another input.id"
                )
    own = open_source(files, job.input.max_line_bytes, span)
    return InputPart(own, reading(job, dialect), span, types)


def reading(job: Job, dialect: str) -> Job:
    """The job for a shard's records: with the dialect of the whole input, and without a minimum of rows."""
    return msgspec.structs.replace(job, input=msgspec.structs.replace(job.input, dialect=dialect, min_rows=0))


def digests(files: tuple[InputFile, ...], *, sharded: bool) -> tuple[str, ...]:
    """The digests that identify the files' content. Of a Parquet file, shards read only the footer."""
    if sharded and files and content_of(files[0]) == "parquet":
        return tuple(parquet.footer_digest(file) if isinstance(file, Path) else digest(file) for file in files)
    return tuple(map(digest, files))


def require_same(shard: Shard | None, known: Manifest, directory: Path) -> None:
    """Returns if the run in the directory is this shard, or none.

    Raises:
        JobError: it is another shard, or one without `--shard`, or the other way round.
    """
    there = None if known.share is None else known.share.shard
    if there == shard:
        return
    if there is None:
        raise JobError(f"{directory}: the run there is not a shard; leave out --shard, or {ANOTHER}")
    raise JobError(f"{directory}: the run there is shard {there}; resume it with --shard {there}, or {ANOTHER}")


def require_unchanged(known: Manifest, reasons: tuple[str, ...]) -> None:
    """Returns if nothing has changed, or the run is not a shard. A shard keeps the rows of its original input, and
    the other shards have the original job.

    Raises:
        JobError: the input or the job of a shard has changed.
    """
    if known.share is None or not reasons:
        return
    what = ", ".join(each if " " in each else f"{each} has changed" for each in reasons)
    raise JobError(
        f"{what}: the input and the requests of a shard can't change; restore it, or start all shards again (--new, or "
        "another -o) with --reuse for the answers that these have"
    )
