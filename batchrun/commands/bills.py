"""`batchrun report`, the bill over runs, and `batchrun compare`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.commands.echo import PATHS, say, write
from batchrun.errors import ExitCode
from batchrun.terminal import harmless

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchrun.report.runs import Found


@click.command()
@PATHS
@click.option(
    "--by", default="job,model", metavar="KEYS", help="Some of night,day,month,job,model,status,tag,tag.NAME,run."
)
@click.option("--since", metavar="DATE", help="Only what was spent from this day or month on.")
@click.option("--until", metavar="DATE", help="Only what was spent up to this day or month, it included.")
@click.option(
    "--tz", "zone", default="UTC", metavar="ZONE", help="Whose days: UTC, local, Europe/Berlin; invoices have UTC."
)
@click.option("--columns", metavar="NAMES", help="Figures to show, or all.")
@click.option("--findings", is_flag=True, help="Say what is unusual in the newest run of each job.")
@click.option(
    "--finding", "limits", multiple=True, metavar="NAME=SHARE", help="A finding's threshold, NAME=off, or off."
)
@click.option("--against", "other", metavar="last|N|PATH", help="The newest run of each job beside earlier ones.")
@click.option("--fail-on-drift", is_flag=True, help="Exit 8 where a figure jumped; with --against.")
@click.option(
    *("--reprice", "new_prices"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What if: the bill at the prices of a TOML file.",
)
@click.option(
    *("--reconcile", "invoice"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Instead of a bill: the runs beside an invoice (CSV) by request id, or by day and model.",
)
@click.option("--format", "form", type=click.Choice(["table", "markdown", "csv", "json", "parquet", "xlsx", "html"]))
@click.option(
    "-o",
    "--output",
    "target",
    type=click.Path(path_type=Path),
    help="A file instead of stdout: .txt, .md, .csv, .json, .parquet, .xlsx or .html.",
)
def report(
    paths: tuple[Path, ...],
    by: str,
    since: str | None,
    until: str | None,
    zone: str,
    columns: str | None,
    findings: bool,
    limits: tuple[str, ...],
    other: str | None,
    fail_on_drift: bool,
    new_prices: Path | None,
    invoice: Path | None,
    form: str | None,
    target: Path | None,
) -> None:
    """The bill over run directories and completions files."""
    from datetime import UTC, datetime

    from batchrun.errors import JobError
    from batchrun.report import bill as reporting
    from batchrun.report import findings as noticing
    from batchrun.report import formats, nightly, reprice, runs
    from batchrun.report import keys as grouping

    form, keys = formats.form_of(target, form), grouping.keys(by)
    named, span = formats.chosen(columns), grouping.span(zone, since, until)
    formats.require_no_input(target, paths)
    against = None if other is None else nightly.against(other)
    if fail_on_drift and against is None:
        raise JobError("--fail-on-drift goes with --against")
    if new_prices is not None and (form == "html" or span.zone != "UTC"):
        raise JobError(
            "--reprice goes neither with a page nor with another --tz than UTC: rows have the price they had"
        )
    thresholds = noticing.thresholds(limits) if findings or limits or form == "html" else None
    found = runs.find(paths)
    if invoice is not None:
        write(_reconciled(invoice, found.found, form), target, for_eyes=form != "json")
        return
    if new_prices is not None:
        found, before = found._replace(found=reprice.repriced(found.found, reprice.read(new_prices))), found.found
    bill = reporting.of_runs(found, reporting.Asked(keys, span, thresholds, against))
    if new_prices is not None:
        bill = reporting.what_if(bill, str(new_prices), reprice.total(before), reprice.total(found.found))
    if form == "html":
        from batchrun.report.page import page

        content = page(bill, found.found, named or formats.SHOWN, datetime.now(UTC))
    else:
        content = formats.render(bill, form, named)
    write(content, target, for_eyes=form in ("table", "markdown"))
    if fail_on_drift and bill.drifted:
        sys.exit(ExitCode.DRIFT)


def _reconciled(invoice: Path, found: "Sequence[Found]", form: str) -> bytes:
    import msgspec

    from batchrun.errors import JobError
    from batchrun.report import reconcile

    if form not in ("table", "json"):
        raise JobError(f"--reconcile goes with --format table or json, not {form}")
    told = reconcile.reconcile(invoice, found)
    if form == "json":
        return msgspec.json.format(msgspec.json.encode(told), indent=2) + b"\n"
    return "".join(f"{line}\n" for line in reconcile.in_words(told)).encode()


@click.command()
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--id", "by", metavar="COLUMN", help="The input's column that says which rows are the same, or row.")
@click.option("-n", "examples", type=click.IntRange(0), default=20, show_default=True, help="Changed rows to show.")
@click.option("--json", "as_json", is_flag=True, help="An object instead of lines.")
def compare(before: Path, after: Path, by: str | None, examples: int, as_json: bool) -> None:
    """Two runs over the same questions, row by row: what changed, and what it cost."""
    import msgspec

    from batchrun.report import compare as comparing
    from batchrun.report.look import result_at
    from batchrun.store.rundir import RunDirectory

    one, other = (result_at(RunDirectory(place)) for place in (before, after))
    comparison = comparing.compare(one, other, by, examples)
    if as_json:
        say(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode())
        return
    for line in comparing.in_words(comparison):
        say(harmless(line))
