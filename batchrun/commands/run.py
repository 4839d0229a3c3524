"""`batchrun run`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchrun.commands.options import DATE, INPUT, JOB, REUSE, SET, SHARD, SKIP, amount
from batchrun.commands.results import say
from batchrun.terminal import LOG_FORMAT, LOG_FORMAT_ENV, Progress, ended, note, result, set_job

if TYPE_CHECKING:
    from decimal import Decimal

    from batchrun.api import Options
    from batchrun.job.job import Job
    from batchrun.run_summary import Summary


ACCEPT_INPUT = "--accept-changes-of-input"
"""Click's name for `--accept-changes=input`."""


class RunCommand(click.Command):
    """`--accept-changes` alone, and with a value: click would take the next word for one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [ACCEPT_INPUT if word == "--accept-changes=input" else word for word in args])


@click.command(cls=RunCommand)
@JOB
@INPUT
@REUSE
@click.option(
    "-o", "--output", "output_path", metavar="DIR", help="The run directory or a URL, instead of output.path."
)
@click.option(
    "--state-dir",
    metavar="DIR",
    help="If the output is a URL: where runs keep their files; default: ~/.local/state/batchrun.",
)
@DATE
@SHARD
@click.option("--new", is_flag=True, help="Start another run instead of resuming the last.")
@click.option(
    *("--max-cost", "max_cost_usd"),
    metavar="USD",
    callback=amount("an amount in USD"),
    help="Hard cap for the whole run, in USD.",
)
@click.option("--max-failures", type=int, metavar="N", help="Exit 0 with up to N failed rows.")
@click.option("--deadline", metavar="WHEN", help="Stop by then: 6h, 90m, 06:00 (the next), 2026-11-26T06:00.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows; omit it to run the rest.")
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Resume although input or job changed; send only rows without an answer. "
    "--accept-changes=input: only the input may have changed.",
)
@click.option(ACCEPT_INPUT, "accept_input", is_flag=True, hidden=True)
@click.option("--accept-canary", is_flag=True, help="Send the other rows even if the canary fails.")
@click.option("--retry-failed", is_flag=True, help="Retry failed rows of a complete run; --set may change request.*.")
@click.option(
    "--status", "statuses", metavar="LIST", help="With --retry-failed: rows of these statuses, e.g. truncated,error."
)
@SKIP
@click.option(
    *("--grace", "grace_s"),
    metavar="SECONDS",
    callback=amount("seconds, 0 or more"),
    help="How long requests in flight may take after a signal or the deadline; default: 20.",
)
@click.option("--engine", metavar="NAME", help="Which processes send: local (this one) or ray (Ray's actors).")
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="The Ray cluster, host:port or auto; default: RAY_ADDRESS, else Ray on this machine.",
)
@click.option(
    LOG_FORMAT,
    type=click.Choice(["plain", "json"]),
    envvar=LOG_FORMAT_ENV,
    expose_value=False,
    help="json: each line on stderr and stdout is a JSON object, and there is no progress bar.",
)  # `cli` reads it first
@SET
def run(
    job: Path,
    input_path: str | None,
    reuse: tuple[str, ...],
    output_path: str | None,
    state_dir: str | None,
    accept_changes: bool,
    accept_input: bool,
    max_cost_usd: "Decimal | None",
    max_failures: int | None,
    retry_failed: bool,
    statuses: str | None,
    grace_s: "Decimal | None",
    engine: str | None,
    ray_address: str | None,
    overrides: tuple[str, ...],
    **options: Any,
) -> None:
    """Send every row of the input. Run the same command again to resume where it stopped."""
    import batchrun
    from batchrun import memory, open_files
    from batchrun.commands.job_input import read_job
    from batchrun.errors import JobError
    from batchrun.report import resume_command
    from batchrun.startup import shard as shards

    if statuses is not None and not retry_failed:
        raise JobError("--status needs --retry-failed")
    flags = {
        **{"budget.max_cost_usd": max_cost_usd, "output.max_failures": max_failures},
        **{"input.reuse_from": reuse or None, "engine.name": engine, "engine.ray_address": ray_address},
        "output.state_dir": state_dir,
    }
    memory.share_one_arena()
    loaded = read_job(job, input_path, output_path, overrides, flags)
    set_job(loaded.name)
    open_files.allow(2 * loaded.total_limits.max_in_flight)  # a stream that has ended keeps its connection for a second
    with Progress() as progress:
        started: Options = {
            **options,  # type: ignore[typeddict-item]  # the other flags have the names of `Options`
            "accept_changes": accept_changes or ("input" if accept_input else False),
            "retry_failed": retry_failed if statuses is None else statuses.split(","),
            "grace_s": None if grace_s is None else float(grace_s),
            "progress": progress.show,
            "note": note,
            "checked": progress.checked,
            "command": resume_command.command(click.get_current_context().params, flags_of(run)),
        }
        try:
            summary = batchrun.run(loaded, **started)
        except batchrun.RunIncompleteError as stopped:
            summary = stopped.summary
        except KeyboardInterrupt as stopped:
            if not isinstance(stopped.__cause__, batchrun.RunIncompleteError):
                raise stopped.__cause__ or stopped  # noqa: B904
            summary = stopped.__cause__.summary
    _report(summary, shards.divided_job(loaded, options["shard"], lambda line: None)[0])
    sys.exit(summary.exit_code or 0)


def flags_of(command: click.Command) -> dict[str, str]:
    """The flag of each option, by the name of its parameter."""
    return {option.name or "": option.opts[0] for option in command.params if isinstance(option, click.Option)}


def _report(summary: "Summary", job: "Job") -> None:
    from datetime import date, datetime, time

    import msgspec

    from batchrun.job.job import flatten
    from batchrun.report import closing
    from batchrun.row_status import failing

    lines = closing.in_words(
        summary,
        requests_per_minute=job.total_limits.requests_per_minute,
        max_failures=job.output.max_failures,
        failing=failing(job.finish),
        command=("batchrun", *sys.argv[1:]),
        settings=flatten(msgspec.to_builtins(job.request, builtin_types=(datetime, date, time)), "request"),
        endpoint=None if job.more_endpoints else job.endpoint,
    )
    for line in lines:
        say(result(line))
    ended(summary)
