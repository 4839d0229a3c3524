"""`batchrun compare`."""

from pathlib import Path

import click

from batchrun.commands import results
from batchrun.commands.remote import ResultPath
from batchrun.commands.results import put, say


@click.command()
@click.argument("before", type=ResultPath(whole=True))
@click.argument("after", type=ResultPath(whole=True))
@click.option("--id", "by", metavar="COLUMN", help="The input column that identifies a row, or `row` for its position.")
@click.option(
    "-n", "examples", type=click.IntRange(0), default=20, metavar="N", help="Show at most N changed rows (20)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def compare(before: Path, after: Path, by: str | None, examples: int, as_json: bool) -> None:
    """Compare two runs over the same questions, row by row. Shows what changed, and what it cost."""
    from batchrun.report import compare as comparing
    from batchrun.report.row_view import result_at
    from batchrun.store.rundir import RunDirectory

    one, other = (result_at(RunDirectory(place)) for place in (before, after))
    comparison = comparing.compare(one, other, by, examples)
    if as_json:
        put(results.as_json(comparison))
        return
    for line in comparing.in_words(comparison):
        say(line)
