"""`batchrun show`."""

import sys
from pathlib import Path

import click

from batchrun.commands.options import RESULT
from batchrun.commands.results import put, say
from batchrun.errors import harmless


@click.command()
@RESULT
@click.option("--status", "statuses", metavar="LIST", help="Rows of these statuses, e.g. error,invalid.")
@click.option("--row", "numbers", metavar="ROWS", help="Rows by their position: 3 or 3,10-12.")
@click.option("--where", metavar="EXPR", help="Rows by their columns: \"cost_usd > 0.01 and error.kind == 'quota'\".")
@click.option("-n", "most", type=click.IntRange(0), default=10, metavar="N", help="At most N rows (10); 0: all.")
@click.option("--columns", metavar="NAMES", help="Columns of the input or the output to show.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each row, a line each.")
def show(
    out: Path,
    statuses: str | None,
    numbers: str | None,
    where: str | None,
    most: int,
    columns: str | None,
    as_json: bool,
) -> None:
    """Print rows of a result, questions beside answers. OUT: a run directory, a completions file, or a URL of one."""
    from batchrun.report import row_view
    from batchrun.store.rundir import RunDirectory

    selection = row_view.Selection(
        statuses=tuple(statuses.split(",")) if statuses else (),
        rows=row_view.row_numbers(numbers) if numbers else (),
        where=where,
        most=most,
        columns=tuple(columns.split(",")) if columns else (),
    )
    result = row_view.result_at(RunDirectory(out))
    found = row_view.rows(result, selection)
    if as_json:
        for row in found:
            put(row_view.as_json(row, selection.columns) + "\n")
        return
    text = (f"{harmless(line)}\n" for row in found for line in row_view.lines(row, result.inputs, selection.columns))
    if sys.stdout.isatty():
        click.echo_via_pager(text)
        return
    empty = True
    for line in text:
        empty = False
        put(line)
    if empty:
        say("no row matches")
