"""Commands that look at runs and change nothing: `batchrun status`, `batchrun show`, `batchrun watch`."""

import sys
from pathlib import Path

import click

from batchrun.commands.echo import OUT, PATHS, say
from batchrun.errors import ExitCode
from batchrun.terminal import harmless


@click.command()
@PATHS
@click.option("--json", "as_json", is_flag=True, help="An array of an object for each run.")
@click.option("--exit-code", is_flag=True, help="Exit 4 where a run is unfinished and no process works on it.")
def status(paths: tuple[Path, ...], as_json: bool, exit_code: bool) -> None:
    """Where a run stands, also while it works; or many runs, a line each, unfinished ones first."""
    from datetime import UTC, datetime

    from batchrun.report import nights, status
    from batchrun.report.at_rest import standing
    from batchrun.store.rundir import RunDirectory

    one = len(paths) == 1 and not as_json and nights.is_run(paths[0])
    found = [] if one and not exit_code else nights.collect(paths, datetime.now(UTC))
    if as_json:
        say(nights.as_json(found))
    else:
        directory = RunDirectory(paths[0])
        for line in status.lines(directory, standing(directory)) if one else nights.lines(found):
            say(harmless(line))
    if exit_code:
        sys.exit(nights.exit_code(found))


@click.command()
@OUT
@click.option("--status", "statuses", metavar="LIST", help="Rows of these statuses, e.g. error,invalid.")
@click.option("--row", "numbers", metavar="ROWS", help="Rows by their position: 3 or 3,10-12.")
@click.option("--where", metavar="EXPR", help="Rows by their columns: \"cost_usd > 0.01 and error.kind == 'quota'\".")
@click.option("-n", "most", type=click.IntRange(0), default=10, show_default=True, help="At most so many; 0: all.")
@click.option("--columns", metavar="NAMES", help="What to show of each row, the input's columns or the output's.")
@click.option("--json", "as_json", is_flag=True, help="A JSON object on a line for each row.")
def show(
    out: Path,
    statuses: str | None,
    numbers: str | None,
    where: str | None,
    most: int,
    columns: str | None,
    as_json: bool,
) -> None:
    """Rows of a result: the question beside the answer. OUT is a run directory or a completions file."""
    from batchrun.report import look as looking
    from batchrun.store.rundir import RunDirectory

    look = looking.Look(
        statuses=tuple(statuses.split(",")) if statuses else (),
        rows=looking.rows_of(numbers) if numbers else (),
        where=where,
        most=most,
        columns=tuple(columns.split(",")) if columns else (),
    )
    result = looking.result_at(RunDirectory(out))
    found = looking.rows(result, look)
    if as_json:
        for row in found:
            say(looking.as_json(row, look.columns))
        return
    text = (f"{harmless(line)}\n" for row in found for line in looking.lines(row, result.inputs, look.columns))
    if sys.stdout.isatty():
        click.echo_via_pager(text)
        return
    empty = True
    for line in text:
        empty = False
        say(line, nl=False)
    if empty:
        say("no such row")


@click.command()
@OUT
@click.option("--every", "every_s", type=click.FloatRange(0.1, 3600), default=1.0, metavar="SECONDS", show_default=True)
def watch(out: Path, every_s: float) -> None:
    """A run at work, as it goes: throughput, limits, money, its end, how rows end. Ends with it, by its exit code."""
    import os
    import time

    from batchrun.report import status, watching
    from batchrun.report.at_rest import standing
    from batchrun.report.progress import line
    from batchrun.store.rundir import RunDirectory

    directory, screen = RunDirectory(out), sys.stdout.isatty()
    if screen:
        say("\x1b[2J", nl=False)
    shown = ""
    while True:
        found = standing(directory)
        if screen:
            size = os.get_terminal_size(sys.stdout.fileno())  # not COLUMNS: it does not follow a resize
            told = list(status.lines(directory, found))
            say(watching.frame(found.summary, told, size.columns, size.lines, harmless), nl=False)
        elif (text := harmless(line(found.summary))) != shown:
            shown = text
            say(shown)
        if not found.alive:
            sys.exit(ExitCode.STOPPED if found.died else found.summary.exit_code or 0)
        time.sleep(every_s)
