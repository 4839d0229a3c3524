"""`batchrun tune`."""

from pathlib import Path

import click

from batchrun.commands.options import OUT
from batchrun.commands.results import say


@click.command()
@OUT
@click.option("--rps", "requests_per_second", metavar="N", help="Requests a second.")
@click.option("--rpm", "requests_per_minute", metavar="N", help="Requests a minute.")
@click.option("--rpd", "requests_per_day", metavar="N", help="Requests a day (UTC), including those sent today.")
@click.option("--tpm", "tokens_per_minute", metavar="N", help="Tokens a minute.")
@click.option("--input-tpm", "input_tokens_per_minute", metavar="N", help="Tokens of prompts a minute.")
@click.option("--output-tpm", "output_tokens_per_minute", metavar="N", help="Tokens of answers a minute.")
@click.option("--max-in-flight", metavar="N", help="Requests in flight; at most as many as the process started with.")
@click.option("--max-cost", "max_cost_usd", metavar="USD", help="The cap on cost, if the run has one.")
@click.option("--max-tokens", metavar="N", help="The cap on tokens, if the run has one.")
@click.option("--max-requests", metavar="N", help="The cap on requests, if the run has one.")
def tune(out: Path, **settings: str | None) -> None:
    """Change the limits of a running run, until it ends."""
    from batchrun.dispatch import live_limits
    from batchrun.store.rundir import RunDirectory

    change = live_limits.parse({name: value for name, value in settings.items() if value is not None})
    limits = live_limits.apply(RunDirectory(out), change)
    say("accepted" if limits is None else f"accepted: {live_limits.describe(change, limits)}")
