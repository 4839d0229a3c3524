"""`batchrun merge`: the shards of one run as one result and one bill."""

import re
import sys
from pathlib import Path

import click

from batchrun.commands.options import PATHS
from batchrun.commands.results import say


@click.command()
@PATHS
@click.option(
    *("-o", "--output", "target"),
    type=click.Path(path_type=Path),
    help="Where the merged run goes; default: the name that the shards share.",
)
def merge(paths: tuple[Path, ...], target: Path | None) -> None:
    """Join the complete shards of a run into one run directory. Sends nothing, changes no shard."""
    from batchrun.errors import JobError
    from batchrun.merge import merged
    from batchrun.merge.shards import read
    from batchrun.report.wording import plural

    shards = read(paths)
    if target is None:
        named = {re.sub(r"\.shard-\d+-of-\d+$", "", str(shard.directory.path)) for shard in shards}
        if len(named) != 1 or any(str(shard.directory.path) in named for shard in shards):
            raise JobError("the shards share no name; say where the merged run goes with -o")
        target = Path(named.pop())
    made = merged.merge(shards, target)
    summary = made.summary
    if not made.written:
        say(f"{target}: merged already; nothing is written")
    statuses = ", ".join(f"{n:,} {status}" for status, n in summary.by_status.items())
    say(f"rows         {plural(summary.rows, 'row')} of {len(shards):,} shards: {statuses or 'none'}")
    say(f"cost         ${summary.cost_usd:,.6f}")
    for name, path in summary.files.items():
        say(f"{name:<12} {path}")
    sys.exit(summary.exit_code or 0)
