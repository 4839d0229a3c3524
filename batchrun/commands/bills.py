"""`batchrun report`: the bill over runs."""

from pathlib import Path

import click

from batchrun.commands.echo import PATHS, write


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
    form: str | None,
    target: Path | None,
) -> None:
    """The bill over run directories and completions files."""
    from batchrun.report import bill as reporting
    from batchrun.report import formats
    from batchrun.report import keys as grouping

    form, keys = formats.form_of(target, form), grouping.keys(by)
    named, span = formats.chosen(columns), grouping.span(zone, since, until)
    formats.require_no_input(target, paths)
    content = formats.render(reporting.collect(paths, keys, span), form, named)
    write(content, target, for_eyes=form in ("table", "markdown"))
