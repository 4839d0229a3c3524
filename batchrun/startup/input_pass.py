"""Reads the input once from end to end: checks every record, and makes the run's manifest of what it finds."""

import os
from datetime import datetime

import msgspec
import pyarrow as pa

from batchrun.durable import disk_errors, fsync
from batchrun.errors import InputError, JobError
from batchrun.job.job import Job
from batchrun.records import Request
from batchrun.request import image_digests
from batchrun.source import FileIdentity, InputFile, Source, TableSource, changed, find_files
from batchrun.startup import preconditions, shard, stdin_copy
from batchrun.startup.answer_match import Questions
from batchrun.startup.input_check import Problem, Survey, survey
from batchrun.startup.run_options import RunOptions
from batchrun.store.manifest import InputShare, Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.rows import output_schema


def input_files(
    job: Job, directory: RunDirectory, options: RunOptions, *, started: bool = True
) -> tuple[InputFile, ...]:
    """The files of the input. Standard input and a program's rows are copied into the run directory (`stdin_copy`)."""
    if job.input.path is None:
        raise JobError("input.path: name the input in the job or with -i")
    if job.input.path != "-":
        return find_files(job.input.path, job.input.partitions, job.storage)
    if options.stdin is not None and not options.stdin.isatty():
        return (stdin_copy.save(options.stdin, directory, started=started),)
    if not directory.spool.exists():
        raise InputError("standard input is a terminal, or closed; pipe JSON lines into it, or name a file with -i")
    return (directory.spool,)


def check(
    source: Source,
    job: Job,
    directory: RunDirectory,
    options: RunOptions,
    questions: Questions,
    pictures: Questions | None = None,
) -> Survey:
    """Reads the input; invalid records end the start, or go to rejects.jsonl with --skip-invalid.

    `questions` gets the request key of each record, `pictures` the digest of the images of those that have some.
    """
    rejects = directory.rejects
    with disk_errors(rejects):
        rejects.unlink(missing_ok=True)

    def keep(problem: Problem) -> None:
        if options.skip_invalid:
            with (
                disk_errors(rejects),
                open(os.open(rejects, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file,
            ):
                file.write(msgspec.json.encode(problem, enc_hook=str) + b"\n")

    def accepted(ordinal: int, request: Request, images: bytes) -> None:
        questions.add(ordinal, request.key)
        if images and pictures is not None:
            pictures.add(ordinal, images)

    preconditions.require_columns(job, source)
    found = survey(source, job, directory.path, keep=keep, progress=options.checked, accepted=accepted)
    preconditions.require_input(job, source, found, options.problem, skip_invalid=options.skip_invalid)
    if found.rejected:
        with disk_errors(rejects):
            fsync(rejects)
    return found


def manifest_of(
    job: Job,
    source: Source,
    files: tuple[FileIdentity, ...],
    found: Survey,
    *,
    run_id: str,
    created_at: datetime,
    share: InputShare | None = None,
) -> Manifest:
    """The manifest of a run over this input.

    Raises:
        InputError: the input has changed since `files` was taken.
    """
    digests = shard.digests(source.files, sharded=share is not None)
    if (what := changed(source.files, files)) is not None:
        raise InputError(f"the input changed while it was read: {what}; run again when it no longer changes")
    return Manifest(
        run_id=run_id,
        created_at=created_at,
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
        share=share,
    )


MOST_NAMED = 30
"""Columns that a message names; a table may have thousands."""


def columns_in_words(source: Source, found: Survey) -> str | None:
    """The input's columns with their types; None if it has no types. Every CSV column is text."""
    if isinstance(source, TableSource):
        schema = source.schema
    elif found.types is not None:
        schema = found.types.schema()
    else:
        return None
    named = [f"{field.name} {field.type}" for field in schema][:MOST_NAMED]
    more = f" and {len(schema) - MOST_NAMED:,} more" if len(schema) > MOST_NAMED else ""
    return f"columns: {', '.join(named)}{more}" if named else None


def schema_of(source: Source, known: Manifest) -> pa.Schema:
    types = known.column_types or ColumnTypes()
    return output_schema(
        source.schema if isinstance(source, TableSource) else types.schema(), known.output, known.answer_column
    )


def keep_digests(job: Job, directory: RunDirectory, layout: int, pictures: Questions, found: Survey) -> None:
    """Stores the digests of the rows' images, if images are files: these can change while the input stays the same."""
    if job.input.image_root is not None:
        image_digests.write(directory.images_of(layout), pictures.rows(found.rejected))
