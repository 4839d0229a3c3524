"""The command line: flags → job → run → echo → exit code. With `commands` the only importer of click.

Everything heavy is imported by the command that needs it: `batchrun --help` answers in a twentieth of a second.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun import __version__, streams
from batchrun.commands import bills, looks
from batchrun.commands.echo import OUT, say
from batchrun.errors import BatchrunError, ExitCode
from batchrun.terminal import Progress, harmless, note

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from decimal import Decimal

    from batchrun.job.job import Job
    from batchrun.prices import PriceTable
    from batchrun.records import Summary
    from batchrun.source import Source
    from batchrun.startup.input_check import Survey
    from batchrun.store.origins import Origins
    from batchrun.store.rundir import RunDirectory


def _amount(what: str) -> "Callable[[click.Context, click.Parameter, str | None], Decimal | None]":
    """Reads a flag as a finite number of 0 or more: click's own types take nan and inf."""

    def read(context: click.Context, parameter: click.Parameter, text: str | None) -> "Decimal | None":
        from decimal import Decimal

        try:
            number = None if text is None else Decimal(text)
        except ArithmeticError:
            number = Decimal("nan")
        if number is not None and not (number.is_finite() and number >= 0):
            raise click.BadParameter(f"expected {what} (is {text})")
        return number

    return read


JOB = click.argument("job", type=click.Path(dir_okay=False, path_type=Path))
INPUT = click.option("-i", "--input", "input_path", metavar="PATH", help="Input instead of input.path; - is stdin.")
SET = click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Lay one setting over the job.")
REUSE = click.option(
    "--reuse",
    multiple=True,
    metavar="PATH",
    help="Take answers of earlier runs instead of input.reuse_from: a run, a pattern, a Parquet file, or latest.",
)
SKIP = click.option("--skip-invalid", is_flag=True, help="Set bad records aside (run: in rejects.jsonl).")


ACCEPT_INPUT = "--accept-changes-of-input"
"""What `--accept-changes=input` is to click."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchrun")
def cli() -> None:
    """Run a file of prompts against a chat-completions API; get a Parquet file of answers and their cost."""


class RunCommand(click.Command):
    """`--accept-changes` alone, and with a value: click would take the next word for one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [ACCEPT_INPUT if word == "--accept-changes=input" else word for word in args])


@cli.command(cls=RunCommand)
@JOB
@INPUT
@REUSE
@click.option("-o", "--output", "output_path", metavar="DIR", help="Run directory instead of output.path.")
@click.option("--date", metavar="YYYY-MM-DD", help="The logical date for {date}; default: the first start's.")
@click.option("--new", is_flag=True, help="Start another run instead of going on with the last.")
@click.option(
    *("--max-cost", "max_cost_usd"),
    metavar="USD",
    callback=_amount("an amount in USD"),
    help="Hard cap for the whole run, in USD.",
)
@click.option("--max-failures", type=int, metavar="N", help="Failed rows that still exit 0.")
@click.option("--deadline", metavar="WHEN", help="End by then: 6h, 90m, 06:00 (the next), 2026-11-26T06:00.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N rows; without it the run goes on.")
@click.option(
    "--accept-changes",
    is_flag=True,
    help="Go on over a changed input or job: what has no answer is sent. --accept-changes=input: not a changed job.",
)
@click.option(ACCEPT_INPUT, "accept_input", is_flag=True, hidden=True)
@click.option("--retry-failed", is_flag=True, help="Ask failed rows of a complete run again; --set may vary request.*.")
@click.option("--status", "statuses", metavar="LIST", help="With --retry-failed: which, e.g. truncated,error.")
@SKIP
@click.option(
    *("--grace", "grace_s"),
    metavar="SECONDS",
    callback=_amount("seconds, 0 or more"),
    help="To drain after a signal or the deadline; 20.",
)
@SET
def run(
    job: Path,
    input_path: str | None,
    reuse: tuple[str, ...],
    output_path: str | None,
    date: str | None,
    new: bool,
    max_cost_usd: "Decimal | None",
    max_failures: int | None,
    deadline: str | None,
    limit: int | None,
    accept_changes: bool,
    accept_input: bool,
    retry_failed: bool,
    statuses: str | None,
    skip_invalid: bool,
    grace_s: "Decimal | None",
    overrides: tuple[str, ...],
) -> None:
    """Ask every row of the input. The same command again goes on where the last one stopped."""
    import batchrun
    from batchrun import open_files
    from batchrun.report import again

    flags = {"budget.max_cost_usd": max_cost_usd, "output.max_failures": max_failures}
    loaded = _load(job, input_path, output_path, overrides, {**flags, "input.reuse_from": reuse or None})
    open_files.allow(2 * loaded.limits.max_in_flight)  # a stream that has ended keeps its connection for a second
    with Progress() as progress:
        try:
            summary = batchrun.run(
                loaded,
                date=date,
                new=new,
                limit=limit,
                deadline=deadline,
                accept_changes=accept_changes or ("input" if accept_input else False),
                retry_failed=_retry_statuses(retry_failed, statuses),
                skip_invalid=skip_invalid,
                grace_s=None if grace_s is None else float(grace_s),
                progress=progress.show,
                note=note,
                checked=progress.checked,
                command=again.command(click.get_current_context().params),
            )
        except (batchrun.RunIncompleteError, KeyboardInterrupt) as stopped:
            summary = _where_it_stands(stopped)
    _tell(summary, loaded)
    sys.exit(summary.exit_code or 0)


@cli.command()
@JOB
@INPUT
@REUSE
@SKIP
@SET
def check(
    job: Path, input_path: str | None, reuse: tuple[str, ...], skip_invalid: bool, overrides: tuple[str, ...]
) -> None:
    """Check all that a run would refuse: the job, every input record and its request. Sends nothing."""
    from batchrun import preflight
    from batchrun.report.summary import plural
    from batchrun.startup import carry, input_pass

    loaded = _load(job, input_path, None, overrides, {"input.reuse_from": reuse or None})
    preflight.require_settings(loaded, preflight.place(loaded))
    source, found, origins = _read_through(loaded, preflight.place(loaded), skip_invalid=skip_invalid)
    _require_budget(loaded, found)
    models = ", ".join(f"{model} ({rows:,})" for model, rows in found.models.items())
    where = plural(len(source.files), "file")
    aside = f", {len(found.rejected):,} set aside" if found.rejected else ""
    asks = f"{plural(found.rows, 'row')} in {where}{aside}, read as {found.dialect}; {models}"
    say(harmless(asks) if found.rows else f"0 rows in {where}: there is nothing to send")
    if (columns := input_pass.columns_in_words(source, found)) is not None:
        say(harmless(columns))
    if origins is not None and (line := carry.in_words(origins)) is not None:
        say(line)
    preflight.key(loaded, os.environ)


@cli.command()
@JOB
@INPUT
@REUSE
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), help="A run directory: what the rest would take."
)
@SKIP
@SET
def estimate(
    job: Path,
    input_path: str | None,
    reuse: tuple[str, ...],
    out: Path | None,
    skip_invalid: bool,
    overrides: tuple[str, ...],
) -> None:
    """Tokens, cost and time of a job, or of the rest of a run. Sends nothing."""
    from datetime import datetime

    from batchrun import preflight
    from batchrun.limits import daily
    from batchrun.startup import carry, previous_run
    from batchrun.startup import estimate as estimating
    from batchrun.startup.preview import look
    from batchrun.store.rundir import RunDirectory

    loaded = _load(job, input_path, None, overrides, {"input.reuse_from": reuse or None})
    found = None if out is None else look(loaded, RunDirectory(out))
    directory = preflight.place(loaded) if out is None else RunDirectory(out)
    preflight.require_settings(loaded, directory)
    _, surveyed, origins = _read_through(loaded, directory, skip_invalid=skip_invalid)
    tables = _require_budget(loaded, surveyed)
    now = datetime.now().astimezone()
    if found is not None:
        for line in estimating.run_in_words(found.summary, None if found.drift is None else str(found.drift)):
            say(harmless(line))
    if origins is not None and found is None and (not_sent := carry.in_words(origins)) is not None:
        say(not_sent)
    new = surveyed.rows if origins is None else origins.new
    to_ask = new if found is None else found.to_ask
    done = None if found is None else found.summary
    means = previous_run.newest(loaded, besides=out)
    estimated = estimating.estimate(surveyed, loaded, tables, to_ask, done, daily.left_s(now), means)
    for line in estimating.in_words(estimated, tables, loaded.endpoint.url):
        say(harmless(line))
    preflight.key(loaded, os.environ)


@cli.command()
@OUT
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), help="A file instead, outside of OUT.")
def export(out: Path, target: Path | None) -> None:
    """Write the rows that a stopped run has so far, the others as pending. Sends nothing; the run stays as it is."""
    from batchrun.integrity import export as exporting
    from batchrun.store.rundir import RunDirectory

    for line in exporting.in_words(exporting.export(RunDirectory(out), target)):
        say(harmless(line))


@cli.command()
@OUT
@click.option("--rps", "requests_per_second", metavar="N", help="Requests a second.")
@click.option("--rpm", "requests_per_minute", metavar="N", help="Requests a minute.")
@click.option("--rpd", "requests_per_day", metavar="N", help="Requests a day (UTC), those made today included.")
@click.option("--tpm", "tokens_per_minute", metavar="N", help="Tokens a minute.")
@click.option("--input-tpm", "input_tokens_per_minute", metavar="N", help="Tokens of prompts a minute.")
@click.option("--output-tpm", "output_tokens_per_minute", metavar="N", help="Tokens of answers a minute.")
@click.option("--max-in-flight", metavar="N", help="Requests at once, at most as many as at its start.")
@click.option("--max-cost", "max_cost_usd", metavar="USD", help="The cap on cost, of a run that has one.")
@click.option("--max-tokens", metavar="N", help="The cap on tokens, of a run that has one.")
@click.option("--max-requests", metavar="N", help="The cap on requests, of a run that has one.")
def tune(out: Path, **settings: str | None) -> None:
    """Change the limits of a run at work, until it ends."""
    from batchrun.dispatch import live_limits
    from batchrun.store.rundir import RunDirectory

    wish = live_limits.parse({name: value for name, value in settings.items() if value is not None})
    limits = live_limits.apply(RunDirectory(out), wish)
    say("taken" if limits is None else f"taken: {live_limits.describe(wish, limits)}")


@cli.command()
@OUT
@click.option("--salvage", is_flag=True, help="Write what is sound into OUT.salvaged.")
def verify(out: Path, salvage: bool) -> None:
    """Check every record and digest of a run. The run must not be at work; touches no file, sends nothing."""
    from batchrun.integrity import salvage as salvaging
    from batchrun.integrity import verify as verifying
    from batchrun.store.rundir import RunDirectory

    if salvage:
        findings, salvaged = salvaging.salvage(RunDirectory(out))
    else:
        findings, salvaged = verifying.verify(RunDirectory(out)), None
    for line in (*verifying.in_words(findings), *(salvaging.in_words(salvaged) if salvaged else ())):
        say(harmless(line))
    sys.exit(ExitCode.DAMAGED if findings.damages else ExitCode.COMPLETE)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
def new(file: Path) -> None:
    """Write a commented job file to start from."""
    from importlib.resources import files

    from batchrun.errors import JobError

    try:
        with file.open("x", encoding="utf-8") as target:
            target.write(files("batchrun").joinpath("new_job.toml").read_text("utf-8"))
    except FileExistsError as error:
        raise JobError(f"{file} is there already; name another file") from error
    except OSError as error:
        raise JobError(f"{file}: can't be written: {error.strerror}") from error
    say(f"wrote {file}; set the input and the prompt, then: batchrun check {file}")


@cli.command()
@click.option("--port", type=int, default=0, help="0: a free one.")
@click.option("--latency", "latency_s", type=float, default=0.4, metavar="SECONDS", help="Median time to an answer.")
@click.option("--rpm", "requests_per_minute", type=int, metavar="N", help="Requests a minute that it allows.")
@click.option("--tpm", "tokens_per_minute", type=int, metavar="N", help="Tokens a minute that it allows.")
@click.option("--faults", default="", metavar="MIX", help='For example "500=0.1,429=0.05,content_policy=0.02".')
@click.option("--seed", type=int, default=0)
@click.option("--ledger", metavar="FILE", help="A JSON line for each exchange served.")
def simulate(
    port: int,
    latency_s: float,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    faults: str,
    seed: int,
    ledger: str | None,
) -> None:
    """A local stand-in for the API, until Ctrl-C."""
    from batchrun.simulator import SimulatorConfig, parse_faults
    from batchrun.simulator.process import run as serve

    config = SimulatorConfig(
        port=port,
        latency_s=latency_s,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        faults=parse_faults(faults),
        seed=seed,
        ledger=ledger,
    )
    serve(config, lambda url: say(f"listening on {url}"))


for command in (looks.status, looks.show, looks.watch, bills.report, bills.compare):
    cli.add_command(command)


def main() -> None:
    """The process: what the commands do, and the documented exit code whatever happens."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # gives memory back; must be set before pyarrow loads
    streams.open_all()
    stdout = sys.stdout
    try:
        cli(standalone_mode=False)
        streams.write_result("")
    except SystemExit:
        if sys.stdout is not stdout:  # after a broken pipe click puts another in its place, and ends with 1
            streams.silence(sys.stdout)
            sys.exit(ExitCode.SIGPIPE)
        raise
    except streams.StdoutClosedError as closed:
        sys.exit(closed.exit_code)
    except BatchrunError as error:
        _end(f"Error: {error}", error.exit_code)
    except click.ClickException as error:
        with streams.for_people():
            error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        _end("Stopped.", ExitCode.SIGINT)
    except Exception as error:
        if os.environ.get("BATCHRUN_TRACEBACK"):
            raise
        _end(*_unexpected(error))


def _unexpected(error: Exception) -> tuple[str, ExitCode]:
    """The last line for an error that no code before named: the machine lacks something, or it is a bug."""
    from batchrun.durable import lacking

    try:
        streams.write_result("")
    except BatchrunError as refused:  # click printed its help, and the text is still in the buffer
        return f"Error: {refused}", refused.exit_code
    if (lack := lacking(error)) is not None:
        return f"Error: {lack}", ExitCode.PAUSED
    return (
        f"Internal error, a bug in batchrun: {type(error).__name__}: {error} "
        "(set BATCHRUN_TRACEBACK=1 for the traceback)",
        ExitCode.INTERNAL_ERROR,
    )


def _end(line: str, exit_code: ExitCode) -> None:
    note(line)
    sys.exit(exit_code)


def _load(
    path: Path,
    input_path: str | None,
    output_path: str | None,
    overrides: tuple[str, ...],
    flags: "Mapping[str, int | Decimal | tuple[str, ...] | None]",
) -> "Job":
    """The job with the command line's settings over it."""
    from batchrun.job.load import load

    said = {"input.path": input_path, "output.path": output_path, **flags}
    own = [f"{name}={_toml(value)}" for name, value in said.items() if value is not None]
    return load(path, [*overrides, *own])


def _read_through(job: "Job", own: "RunDirectory", *, skip_invalid: bool) -> "tuple[Source, Survey, Origins | None]":
    """The input, each record checked, no reason why a run in the directory `own` could not begin with it, and which
    rows would not be sent. Nothing is kept.
    """
    import tempfile

    from batchrun.errors import InputError
    from batchrun.source import open_source
    from batchrun.startup import carry, input_pass, preconditions
    from batchrun.startup.answer_match import Questions
    from batchrun.startup.input_check import survey
    from batchrun.startup.run_options import RunOptions
    from batchrun.store.rundir import RunDirectory

    with tempfile.TemporaryDirectory(prefix="batchrun-") as scratch, Progress() as progress:
        files = input_pass.input_files(
            job, RunDirectory(Path(scratch)), RunOptions(stdin=streams.standard_input()), begun=False
        )

        def tell(text: str) -> None:
            note(_of_stdin(text, job, files[0]))

        try:
            source = open_source(files, job.input.max_line_bytes)
            preconditions.require_columns(job, source)
            with Questions(Path(scratch)) as keys:
                found = survey(source, job, Path(scratch), progress=progress.checked, question=keys.add)
                preconditions.require_input(job, source, found, tell, skip_invalid=skip_invalid)
                if (origins := carry.wanted(job, found.rows, 0)) is not None:
                    every = keys.rows(found.rejected)
                    origins = carry.make(job, every, origins, own.path, Path(scratch) / "origins.bin", note)
        except InputError as error:
            raise InputError(_of_stdin(str(error), job, files[0])) from error
    return source, found, origins


def _of_stdin(text: str, job: "Job", copy: Path) -> str:
    """The message with standard input in place of the temporary copy of it, which no command can convert."""
    if job.input.path != "-":
        return text
    what, found, _ = re.sub("; (convert it with|unpack it first): ", "\0", text).partition("\0")
    way = "; save it as a file, and name that with -i to see how to convert it" if found else ""
    return what.replace(str(copy), "standard input") + way


def _require_budget(job: "Job", found: "Survey") -> "dict[str, PriceTable | None]":
    """The prices of the models that the rows name, by which every cap can be kept."""
    from datetime import date

    from batchrun import price_list
    from batchrun.startup import preconditions

    today, url = date.today().isoformat(), job.endpoint.url
    tables = {model: price_list.resolve(model, job.pricing, today, url) for model in found.models}
    preconditions.require_budget(job, found.max_request, tables)
    return tables


def _toml(value: "str | int | Decimal | tuple[str, ...]") -> str:
    """A flag's value as TOML."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if not isinstance(value, str):
        return str(value) if isinstance(value, int) else f"{value:f}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a path may hold a newline


def _retry_statuses(retry_failed: bool, statuses: str | None) -> bool | list[str]:
    """What is asked again: whatever failed, or the statuses that are listed."""
    from batchrun.errors import JobError

    if statuses is not None and not retry_failed:
        raise JobError("--status goes with --retry-failed")
    return retry_failed if statuses is None else statuses.split(",")


def _where_it_stands(stopped: BaseException) -> "Summary":
    """The summary of a run that began and stopped; where there is none, the reason is raised."""
    from batchrun import RunIncompleteError

    reason = stopped.__cause__ if isinstance(stopped, KeyboardInterrupt) else None  # after Ctrl-C
    reason = reason or stopped
    if isinstance(reason, RunIncompleteError):
        return reason.summary
    raise reason


def _tell(summary: "Summary", job: "Job") -> None:
    from datetime import date, datetime, time

    import msgspec

    from batchrun.job.job import flatten
    from batchrun.policy import failing
    from batchrun.report.summary import in_words

    lines = in_words(
        summary,
        requests_per_minute=job.limits.requests_per_minute,
        max_failures=job.output.max_failures,
        failing=failing(job.finish),
        command=("batchrun", *sys.argv[1:]),
        settings=flatten(msgspec.to_builtins(job.request, builtin_types=(datetime, date, time)), "request"),
    )
    for line in lines:
        say(harmless(line))
    if "HTTP 401:" in (summary.reason or ""):
        say(harmless(f"{'check':<13}the key: {_key_of(job)}"))


def _key_of(job: "Job") -> str:
    """Where the job says that its key is."""
    endpoint = job.endpoint
    if endpoint.api_key_env is not None:
        return f"endpoint.api_key_env names {endpoint.api_key_env}"
    if endpoint.api_key_file is not None:
        return f"endpoint.api_key_file names {endpoint.api_key_file}"
    return "endpoint.headers has it, if anything" if endpoint.headers else "endpoint names none"
