"""`batchrun report`: the bill over runs."""

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrun.commands.options import PATHS
from batchrun.commands.results import as_json, write
from batchrun.errors import ExitCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from batchrun.report.runs import FoundRun


@click.command()
@PATHS
@click.option(
    "--by",
    default="job,model",
    metavar="KEYS",
    help="Lines by some of: night, day, month, job, model, service_tier, status, tag, tag.NAME, run.",
)
@click.option("--since", metavar="DATE", help="Only what was spent from this day or month on.")
@click.option("--until", metavar="DATE", help="Only what was spent up to and including this day or month.")
@click.option(
    *("--tz", "zone"),
    default="UTC",
    metavar="ZONE",
    help="Time zone of the days: UTC (as on invoices), local, Europe/Berlin.",
)
@click.option("--columns", metavar="NAMES", help="The figures to show, or all.")
@click.option("--findings", is_flag=True, help="Report what is unusual in the newest run of each job.")
@click.option(
    *("--finding", "limits"),
    multiple=True,
    metavar="NAME=SHARE",
    help="Set the threshold of a finding; NAME=off turns that one off, off turns all off.",
)
@click.option("--against", "other", metavar="last|N|PATH", help="Compare the newest run of each job with earlier ones.")
@click.option("--fail-on-drift", is_flag=True, help="Exit 8 if a figure jumped; needs --against.")
@click.option(
    *("--reprice", "new_prices"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Print what the same runs would cost at the prices of a TOML file.",
)
@click.option(
    *("--reconcile", "invoice"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare the runs with an invoice (CSV) by request id, or by day and model, instead of a bill.",
)
@click.option(
    *("--format", "form"),
    type=click.Choice(["table", "markdown", "csv", "json", "parquet", "xlsx", "html"]),
    help="The form; default: the one that the ending of -o names, else table.",
)
@click.option(
    *("-o", "--output", "target"),
    type=click.Path(path_type=Path),
    help="Write to this file instead of stdout: .txt, .md, .csv, .json, .parquet, .xlsx or .html.",
)
@click.option(
    *("--png", "picture"),
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also draw the page as a picture, for mail; needs Chromium.",
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
    picture: Path | None,
) -> None:
    """Add up the bill over many runs. PATH: a run directory, a folder of them, a completions file, or a URL."""
    import msgspec

    from batchrun.errors import JobError
    from batchrun.report import bill as bills
    from batchrun.report import earlier_runs, formats, reprice, runs, screenshot
    from batchrun.report import findings as unusual
    from batchrun.report import keys as group_keys

    form, keys = formats.form_of(target, form), group_keys.keys(by)
    named, span = formats.chosen(columns), group_keys.span(zone, since, until)
    for file in (target, picture):
        formats.require_no_input(file, paths)
    drawn = form == "html" or picture is not None
    browser = None if picture is None else screenshot.browser(os.environ)
    against = None if other is None else earlier_runs.against(other)
    if fail_on_drift and against is None:
        raise JobError("--fail-on-drift needs --against")
    if new_prices is not None and (drawn or span.zone != "UTC"):
        raise JobError("--reprice can't make a page or use a --tz other than UTC, because rows keep their price")
    thresholds = unusual.thresholds(limits) if findings or limits or drawn else None
    found = runs.find_runs(paths)
    if invoice is not None:
        write(_reconciled(invoice, found.found, "png" if picture else form), target, for_people=form != "json")
        return
    query = bills.Query(keys, span, thresholds, against)
    if new_prices is None:
        bill = bills.bill_of(found, query)
    else:
        before = found.found
        again = reprice.repriced(before, reprice.read(new_prices))
        bill = bills.bill_of(found._replace(found=again.found), query)
        bill = bills.what_if(bill, str(new_prices), reprice.total(before), reprice.total(again.found), again.kept)
    content = b""
    if drawn:
        from batchrun.report.page import page

        content = page(bill, found.found, named or formats.SHOWN, datetime.now(UTC))
    if browser is not None:
        write(screenshot.png(content, browser), picture, for_people=False)
    if form != "html":
        shown = bill if findings or limits else msgspec.structs.replace(bill, findings=())
        content = formats.render(shown, form, named)
    write(content, target, for_people=form in ("table", "markdown"))
    if fail_on_drift and bill.drifted:
        sys.exit(ExitCode.DRIFT)


def _reconciled(invoice: Path, found: "Sequence[FoundRun]", form: str) -> bytes:
    from batchrun.errors import JobError
    from batchrun.report import reconcile

    if form not in ("table", "json"):
        raise JobError(f"--reconcile works with --format table or json, not {form}")
    reconciled = reconcile.reconcile(invoice, found)
    if form == "json":
        return as_json(reconciled).encode()
    return "".join(f"{line}\n" for line in reconcile.in_words(reconciled)).encode()
