"""`batchrun check` and `batchrun estimate`: what a run would refuse, and what it would cost. Neither sends anything."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.commands.options import DATE, INPUT, JOB, REUSE, SET, SHARD, SKIP
from batchrun.commands.results import say
from batchrun.terminal import note

if TYPE_CHECKING:
    from batchrun.job.job import Job
    from batchrun.store.rundir import RunDirectory


@click.command()
@JOB
@INPUT
@DATE
@SHARD
@REUSE
@SKIP
@SET
def check(
    job: Path,
    input_path: str | None,
    date: str | None,
    shard: str | None,
    reuse: tuple[str, ...],
    skip_invalid: bool,
    overrides: tuple[str, ...],
) -> None:
    """Check a job, its input and its destination as a run would. Sends nothing."""
    from batchrun import preflight
    from batchrun.commands.job_input import read_input, read_job, require_budget
    from batchrun.report.wording import plural
    from batchrun.request.shared_prefix import SharedTextSurvey
    from batchrun.startup import cache_check, input_pass, unsent_rows
    from batchrun.startup import shard as shards

    loaded = read_job(job, input_path, overrides=overrides, flags={"input.reuse_from": reuse or None})
    loaded, own_part = shards.divided_job(loaded, shard, note)
    directory, loaded = preflight.place(loaded, date)
    preflight.require_settings(loaded, directory)
    _try_places(loaded, directory)
    measured = SharedTextSurvey()
    source, found, origins = read_input(
        loaded, directory, skip_invalid=skip_invalid, shard=own_part, accepted=measured.add
    )
    tables = require_budget(loaded, found)
    where = plural(len(source.files), "file")
    if found.rows:
        models = ", ".join(f"{model} ({rows:,})" for model, rows in found.models.items())
        aside = f", {len(found.rejected):,} set aside" if found.rejected else ""
        say(f"{plural(found.rows, 'row')} in {where}{aside}, read as {found.dialect}; {models}")
    else:
        say(f"0 rows in {where}: there is nothing to send")
    if (columns := input_pass.columns_in_words(source, found)) is not None:
        say(columns)
    if origins is not None and (not_sent := unsent_rows.in_words(origins)) is not None:
        say(not_sent)
    for line in cache_check.in_words(measured.result(), loaded, tables):
        (note if line.startswith("warning: ") else say)(line)
    preflight.key(loaded, os.environ)


def _try_places(job: "Job", directory: "RunDirectory") -> None:
    """Writes a small file to each place where a run puts its result, and removes it. (A start claims its
    place in a store, makes its directory, and tries a dataset before it sends.)

    Raises:
        BatchrunError: a place can't be written, or another run has its result there.
    """
    from batchrun.store import rundir, shared_dataset

    directory.try_out()
    shared_dataset.try_out(job.output, job.storage)
    if (url := rundir.published_at(job.output, directory.path)) is not None:
        from batchrun.destination.place import require_usable  # only for a job with a URL

        require_usable(job, directory, url)


@click.command()
@JOB
@INPUT
@DATE
@SHARD
@REUSE
@click.option(
    *("-o", "--output", "out"), type=click.Path(path_type=Path), help="A run directory: estimate the rest of that run."
)
@SKIP
@SET
def estimate(
    job: Path,
    input_path: str | None,
    date: str | None,
    shard: str | None,
    reuse: tuple[str, ...],
    out: Path | None,
    skip_invalid: bool,
    overrides: tuple[str, ...],
) -> None:
    """Estimate tokens, cost and time of a job, or of the rest of a run. Sends nothing."""
    from datetime import datetime

    from batchrun import preflight
    from batchrun.commands.job_input import read_input, read_job, require_budget
    from batchrun.limits import daily
    from batchrun.startup import estimate as estimating
    from batchrun.startup import preview, previous_run, unsent_rows
    from batchrun.startup import shard as shards
    from batchrun.store.rundir import RunDirectory

    loaded = read_job(job, input_path, overrides=overrides, flags={"input.reuse_from": reuse or None})
    loaded, own_part = shards.divided_job(loaded, shard, note)
    directory, loaded = preflight.place(loaded, date)
    found = None if out is None else preview.preview_of(loaded, RunDirectory(out), own_part)
    own = directory if out is None else RunDirectory(out)
    preflight.require_settings(loaded, own)
    _, surveyed, origins = read_input(loaded, own, skip_invalid=skip_invalid, shard=own_part)
    tables = require_budget(loaded, surveyed)
    if found is not None:
        for line in estimating.run_in_words(found.summary, found.changes):
            say(line)
    elif origins is not None and (not_sent := unsent_rows.in_words(origins)) is not None:
        say(not_sent)
    new = surveyed.rows if origins is None else origins.new
    estimated = estimating.estimate(
        surveyed,
        loaded,
        tables,
        new if found is None else found.to_send,
        None if found is None else found.summary,
        daily.left_s(datetime.now().astimezone()),
        previous_run.newest_means(loaded, besides=out),
    )
    for line in estimating.in_words(estimated, tables, loaded.endpoint.url):
        say(line)
    preflight.key(loaded, os.environ)
