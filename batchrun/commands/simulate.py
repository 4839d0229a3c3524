"""`batchrun simulate`."""

from typing import Any

import click

from batchrun.commands.results import say


@click.command()
@click.option("--port", type=int, default=0, help="0: a free one.")
@click.option("--latency", "latency_s", type=float, default=0.4, metavar="SECONDS", help="Median time to an answer.")
@click.option("--rpm", "requests_per_minute", type=int, metavar="N", help="Requests a minute that it allows.")
@click.option("--tpm", "tokens_per_minute", type=int, metavar="N", help="Tokens a minute that it allows.")
@click.option("--faults", default="", metavar="MIX", help='For example "500=0.1,429=0.05,content_policy=0.02".')
@click.option("--seed", type=int, default=0)
@click.option("--ledger", metavar="FILE", help="A JSON line for each exchange served.")
def simulate(faults: str, **settings: Any) -> None:
    """A local stand-in for the API, until Ctrl-C."""
    from batchrun.simulator import SimulatorConfig, parse_faults
    from batchrun.simulator.process import run as serve

    serve(SimulatorConfig(faults=parse_faults(faults), **settings), lambda url: say(f"listening on {url}"))
