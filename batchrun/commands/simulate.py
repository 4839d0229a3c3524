"""`batchrun simulate`."""

from typing import Any

import click

from batchrun.commands.results import say


@click.command()
@click.option("--port", type=int, default=0, help="The port to listen on; default: any free one.")
@click.option(
    "--latency", "latency_s", type=float, default=0.4, metavar="SECONDS", help="Median time to an answer; default: 0.4."
)
@click.option("--rpm", "requests_per_minute", type=int, metavar="N", help="Refuse more requests a minute than N.")
@click.option("--tpm", "tokens_per_minute", type=int, metavar="N", help="Refuse more tokens a minute than N.")
@click.option(
    "--faults", default="", metavar="MIX", help='Faults and their shares, e.g. "500=0.1,429=0.05,content_policy=0.02".'
)
@click.option("--seed", type=int, default=0, help="The seed of answers, latencies and faults; default: 0.")
@click.option("--ledger", metavar="FILE", help="Append a JSON line for each exchange to this file.")
def simulate(faults: str, **settings: Any) -> None:
    """Serve a local stand-in for the API until Ctrl-C."""
    from batchrun.simulator import SimulatorConfig, parse_faults
    from batchrun.simulator.process import run as serve

    serve(SimulatorConfig(faults=parse_faults(faults), **settings), lambda url: say(f"listening on {url}"))
