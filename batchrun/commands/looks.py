"""Commands that look at runs and change nothing: `batchrun status`."""

import sys
from pathlib import Path

import click

from batchrun.commands.echo import PATHS, say
from batchrun.terminal import harmless


@click.command()
@PATHS
@click.option("--json", "as_json", is_flag=True, help="An array of an object for each run.")
@click.option("--exit-code", is_flag=True, help="Exit 4 where a run is unfinished and no process works on it.")
def status(paths: tuple[Path, ...], as_json: bool, exit_code: bool) -> None:
    """Where a run stands, also while it works; or many runs, a line each, unfinished ones first."""
    from datetime import UTC, datetime

    from batchrun.report import nights, status
    from batchrun.rundir import RunDirectory

    one = len(paths) == 1 and not as_json and nights.is_run(paths[0])
    found = [] if one and not exit_code else nights.collect(paths, datetime.now(UTC))
    if as_json:
        say(nights.as_json(found))
    else:
        for line in status.lines(RunDirectory(paths[0])) if one else nights.lines(found):
            say(harmless(line))
    if exit_code:
        sys.exit(nights.exit_code(found))
