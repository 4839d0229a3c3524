"""The bill as one HTML page, which loads nothing and runs no script, even if a model, server or job name has one."""

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files

import jinja2
from markupsafe import Markup

from batchrun.errors import harmless
from batchrun.report import charts, drift, formats, page_data
from batchrun.report.bill import Bill, counted
from batchrun.report.figures import figure
from batchrun.report.runs import FoundRun

HEADLINE = ("cost_usd", "cost_per_1000_rows_usd", "rows", "ok_share", "wasted_usd", "possibly_billed_usd")
"""The figures of the total at the top of the page."""

MOST_MESSAGE = 300
"""Characters shown of a server's message."""


def page(bill: Bill, found: Sequence[FoundRun], columns: Sequence[str], now: datetime) -> bytes:
    """The page, in UTF-8.

    Raises:
        JobError: the charts' package is not installed.
    """
    folder = files("batchrun").joinpath("report")
    style = folder.joinpath("page.css").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    every = counted(found, bill.by, bill.span, rows=False)
    within = [each.found for each in every]
    over_runs = page_data.throughput(within), page_data.latency(bill)
    drawn = []
    for chart in (*page_data.by_night(every, bill.span), *over_runs):
        if chart is not None:
            series = [(plain(name), values) for name, values in chart.series]
            labels = [plain(label) for label in chart.labels]
            clean = chart._replace(title=plain(chart.title), labels=labels, series=series)
            drawn.append((chart, Markup(charts.svg(clean))))  # noqa: S704  (ElementTree wrote it)
    failures, costliest = page_data.rows(within)
    header, *lines = formats.with_total(bill, columns)
    headline = [(formats.heading(name), formats.cell(figure(bill.total, name), name)) for name in HEADLINE]
    text = environment.from_string(folder.joinpath("page.html").read_text("utf-8")).render(
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        bill=bill,
        headline=[("runs", f"{bill.runs:,}"), *headline],
        made=f"{now:%Y-%m-%d %H:%M} UTC",
        keys=len(bill.by),
        header=header,
        lines=lines[:-1],
        total=lines[-1],
        remarks=[line for line in formats.remarks(bill) if not line.startswith(("finding (", "jumped:", "against "))],
        charts=drawn,
        failures=failures,
        costliest=costliest,
        jumps=[(each, [drift.in_words(jump) for jump in each.jumps if jump.jumped]) for each in bill.against],
        most=MOST_MESSAGE,
    )
    return text.encode("utf-8", "replace")


def plain(text: object) -> str:
    """The text on one line, with invisible characters escaped: none changes its direction or hides."""
    return harmless(str(text).replace("\n", " ").replace("\t", " "))
