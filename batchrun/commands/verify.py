"""`batchrun verify` and `batchrun export`: the files of a stopped run."""

import sys
from pathlib import Path

import click

from batchrun.commands.options import OUT
from batchrun.commands.results import say
from batchrun.errors import ExitCode


@click.command()
@OUT
@click.option("--salvage", is_flag=True, help="Copy what is intact into OUT.salvaged.")
@click.option(
    "--rebuild", is_flag=True, help="First rewrite partitions or JSON lines from the parts that the run keeps."
)
def verify(out: Path, salvage: bool, rebuild: bool) -> None:
    """Check every record and digest of a run. Changes no file, sends nothing."""
    from batchrun.integrity import findings as found
    from batchrun.integrity import rebuild as rebuilding
    from batchrun.integrity import salvage as salvaging
    from batchrun.integrity import verify as verifying
    from batchrun.store.rundir import RunDirectory

    if rebuild:
        say(rebuilding.rebuild(RunDirectory(out)))
    if salvage:
        findings, salvaged = salvaging.salvage(RunDirectory(out))
    else:
        findings, salvaged = verifying.verify(RunDirectory(out)), None
    for line in (*found.in_words(findings), *(salvaging.in_words(salvaged) if salvaged else ())):
        say(line)
    sys.exit(ExitCode.DAMAGED if findings.damages else ExitCode.COMPLETE)


@click.command()
@OUT
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="Write to this file, outside of OUT.")
def export(out: Path, target: Path | None) -> None:
    """Write the rows that a stopped run has so far. The others are pending. Changes nothing else, sends nothing."""
    from batchrun.integrity import export as exporting
    from batchrun.store.rundir import RunDirectory

    for line in exporting.in_words(exporting.export(RunDirectory(out), target)):
        say(line)
