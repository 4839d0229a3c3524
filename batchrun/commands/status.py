"""`batchrun status` and `batchrun watch`: the state of runs. Neither changes anything."""

import sys
from pathlib import Path

import click

from batchrun.commands import results
from batchrun.commands.options import OUT, PATHS
from batchrun.commands.results import put, say
from batchrun.errors import ExitCode


@click.command()
@PATHS
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array with an object for each run.")
@click.option(
    "--exit-code",
    is_flag=True,
    help="Exit 4 if a run is unfinished and no process works on it, 7 if a run is unreadable.",
)
def status(paths: tuple[Path, ...], as_json: bool, exit_code: bool) -> None:
    """Show the state of a run, or of many runs, a line each. Unfinished ones come first."""
    from datetime import UTC, datetime

    from batchrun.report import run_list, runs, status
    from batchrun.report.run_state import run_state
    from batchrun.store.rundir import RunDirectory

    one = len(paths) == 1 and not as_json and runs.is_run(paths[0])
    found = [] if one and not exit_code else run_list.collect(paths, datetime.now(UTC))
    if as_json:
        put(results.as_json(found))
    else:
        directory = RunDirectory(paths[0])
        for line in status.lines(directory, run_state(directory)) if one else run_list.lines(found):
            say(line)
    if exit_code:
        sys.exit(run_list.exit_code(found))


@click.command()
@OUT
@click.option(
    *("--every", "every_s"),
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    metavar="SECONDS",
    help="The time between two updates; default: 1.",
)
def watch(out: Path, every_s: float) -> None:
    """Follow a run at work: rows, limits, cost, ETA. Exits with the run's exit code."""
    import os
    import time

    from batchrun.report import status, watch_screen
    from batchrun.report.progress import line
    from batchrun.report.run_state import run_state
    from batchrun.store.rundir import RunDirectory

    directory, screen = RunDirectory(out), sys.stdout.isatty()
    if screen:
        put("\x1b[2J")
    shown = ""
    while True:
        found = run_state(directory)
        if screen:
            size = os.get_terminal_size(sys.stdout.fileno())  # not COLUMNS: it does not follow a resize
            lines = list(status.lines(directory, found))
            put(watch_screen.frame(found.summary, lines, size.columns, size.lines))
        elif (text := line(found.summary)) != shown:
            shown = text
            say(shown)
        if not found.working:
            sys.exit(ExitCode.STOPPED if found.died else found.summary.exit_code or 0)
        time.sleep(every_s)
