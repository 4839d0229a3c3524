"""Reads what `run`, `check` and `estimate` need first: the job with the command line's settings, and its input."""

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from batchrun import streams
from batchrun.errors import InputError
from batchrun.job.job import Job
from batchrun.job.load import load
from batchrun.terminal import Progress, note

if TYPE_CHECKING:
    from batchrun.prices import PriceTable
    from batchrun.records import Request
    from batchrun.run_summary import Shard
    from batchrun.source import Source
    from batchrun.startup.input_check import Survey
    from batchrun.store.origins import Origins
    from batchrun.store.rundir import RunDirectory


def read_job(
    path: Path,
    input_path: str | None = None,
    output_path: str | None = None,
    overrides: tuple[str, ...] = (),
    flags: Mapping[str, int | str | Decimal | tuple[str, ...] | None] | None = None,
) -> Job:
    """The job, with `--set` and then the flags applied to it. `flags` are settings by their path."""
    given = {"input.path": input_path, "output.path": output_path, **(flags or {})}
    return load(path, [*overrides, *(f"{name}={_toml(value)}" for name, value in given.items() if value is not None)])


def _toml(value: str | int | Decimal | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, str):
        return str(value) if isinstance(value, int) else f"{value:f}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a path may hold a newline


def read_input(
    job: Job,
    own: "RunDirectory",
    *,
    skip_invalid: bool,
    shard: "Shard | None" = None,
    accepted: "Callable[[Request], None]" = lambda request: None,
) -> "tuple[Source, Survey, Origins | None]":
    """The input, with every record checked, and which rows a run in the directory `own` would not send. Nothing is kept
    on disk. `accepted` gets each request.

    Raises:
        InputError: a run could not start with it.
    """
    import msgspec

    from batchrun.startup import input_pass, preconditions, unsent_rows
    from batchrun.startup import shard as shards
    from batchrun.startup.answer_match import Questions
    from batchrun.startup.input_check import survey
    from batchrun.startup.run_options import RunOptions
    from batchrun.store.rundir import RunDirectory

    with tempfile.TemporaryDirectory(prefix="batchrun-") as scratch, Progress() as progress:
        files = input_pass.input_files(
            job, RunDirectory(Path(scratch)), RunOptions(stdin=streams.standard_input()), started=False
        )

        def warn(text: str) -> None:
            note(_about_stdin(text, job, files[0]))

        try:
            part = shards.find_input(job, files, shard, Path(scratch), progress.checked, skip_invalid=skip_invalid)
            source = part.source
            preconditions.require_columns(job, source)
            with Questions(Path(scratch)) as keys:
                found = survey(
                    source, part.job, Path(scratch), progress=progress.checked, accepted=accepted, question=keys.add
                )
                found = msgspec.structs.replace(found, types=part.types or found.types)
                preconditions.require_input(part.job, source, found, warn, skip_invalid=skip_invalid)
                first_row = 0 if part.span is None else part.span.start.ordinal
                now, every = unsent_rows.origins_wanted(job, found.rows, 0, first_row), keys.rows(found.rejected)
                path = Path(scratch) / "origins.bin"
                origins = unsent_rows.find_origins(job, every, now, own.path, path, note)
        except InputError as error:
            raise InputError(_about_stdin(str(error), job, files[0])) from error
    return source, found, origins


def _about_stdin(text: str, job: Job, copy: object) -> str:
    """The message with standard input in place of its temporary copy, which no command can convert."""
    if job.input.path != "-":
        return text
    what, found, _ = re.sub("; (convert it with|unpack it first): ", "\0", text).partition("\0")
    advice = "; save it as a file, and name that with -i to see how to convert it" if found else ""
    return what.replace(str(copy), "standard input") + advice


def require_budget(job: Job, found: "Survey") -> "dict[str, PriceTable | None]":
    """The prices of the models that the rows name; a warning on stderr names fees that no cap reserves.

    Raises:
        JobError: a cap of the job can't be kept with them.
    """
    from batchrun.price_list import lookup
    from batchrun.startup import preconditions, search_fees

    today = date.today().isoformat()
    tables = {model: lookup.resolve_for_all(model, job, today) for model in found.models}
    preconditions.require_budget(job, found.max_request, tables)
    if (fees := search_fees.warning(job, tables)) is not None:
        note(fees)
    return tables
