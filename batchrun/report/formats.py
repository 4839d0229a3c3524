"""A bill in each of its formats. All have the same content: figures, what the figures do not cover, and what was left
out. PURE, except that it looks at a target file.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import JobError
from batchrun.report import drift
from batchrun.report.bill import Bill
from batchrun.report.cost_lines import possibly_billed
from batchrun.report.figures import FIGURES, BillLine, Value, figure, kind
from batchrun.report.keys import DaySpan
from batchrun.report.wording import aligned, plural
from batchrun.store.rundir import RunDirectory

ENDINGS = {
    ".txt": "table",
    ".md": "markdown",
    ".csv": "csv",
    ".json": "json",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
    ".html": "html",
}
"""File suffix → format."""

BINARY = frozenset({"parquet", "xlsx"})


def form_of(target: Path | None, form: str | None) -> str:
    """The format, from `--format` or from the suffix of the target.

    Raises:
        JobError: the suffix is unknown, or contradicts `--format`; or a binary format has no target.
    """
    if target is None:
        if form in BINARY:
            raise JobError(f"--format {form} needs a file: name one with -o")
        return form or "table"
    by_suffix = ENDINGS.get(target.suffix.lower())
    if by_suffix is None and form is None:
        raise JobError(f"-o {target}: unknown suffix; expected one of {', '.join(ENDINGS)}, or --format")
    if by_suffix is not None and form is not None and by_suffix != form:
        raise JobError(f"-o {target}: the suffix means {by_suffix}, --format says {form}; give one of them")
    return form or by_suffix or "table"


def require_no_input(target: Path | None, paths: Sequence[Path]) -> None:
    """Refuses a target that would overwrite what the bill is made from.

    Raises:
        JobError: the target is one of the paths, or a file of a run.
    """
    if target is None:
        return
    where = target.resolve()
    in_a_run = RunDirectory(where.parent).checkpoint.exists() and where.exists()
    if in_a_run or where in [path.resolve() for path in paths]:
        raise JobError(f"-o {target}: the bill is made from this file; name another")


def chosen(columns: str | None) -> tuple[str, ...] | None:
    """The figures that `--columns` names; None: the format's own choice.

    Raises:
        JobError: an unknown figure.
    """
    if columns is None:
        return None
    named = FIGURES if columns == "all" else tuple(columns.split(","))
    if unknown := [name for name in named if name not in FIGURES]:
        raise JobError(f"--columns {unknown[0]}: expected some of {', '.join(FIGURES)}, or all")
    return named


def render(bill: Bill, form: str, columns: Sequence[str] | None = None) -> bytes:
    """The bill in one of the formats of `ENDINGS` except html. Text is UTF-8 and ends in a newline.

    Formats for programs have every figure, those for people a selection.
    """
    match form:
        case "csv":
            text = io.StringIO()
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow([*bill.by, *(columns or FIGURES)])
            for line in bill.lines:
                values = (figure(line, name) for name in columns or FIGURES)
                amounts = ("" if value is None else exact(value) for value in values)
                # a spreadsheet would run a text that starts like a formula
                names = (f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name for name in line.group)
                writer.writerow([*names, *amounts])
            return text.getvalue().encode()
        case "json":
            return msgspec.json.format(msgspec.json.encode(tree(bill, columns or FIGURES)), indent=2) + b"\n"
        case "parquet":
            return _parquet(bill, columns or FIGURES)
        case "xlsx":
            from batchrun.report import spreadsheet

            return spreadsheet.workbook(bill, columns or FIGURES, tuple(remarks(bill)))
        case "markdown":
            header, *body = ([cell.translate(_MARKUP) for cell in row] for row in with_total(bill, columns or SHOWN))
            rule = [*["---"] * len(bill.by), *["---:"] * (len(header) - len(bill.by))]
            lines = [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
            notes = [f"- {remark.translate(_MARKUP)}" for remark in remarks(bill)]
            return ("\n".join([*lines, *(["", *notes] if notes else [])]) + "\n").encode()
        case _:
            lines = aligned(with_total(bill, columns or SHOWN), range(len(bill.by)))
            return ("\n".join([*lines, *remarks(bill)]) + "\n").encode()


def exact(value: float | Decimal) -> str:
    """Every digit, without an exponent."""
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def tree(bill: Bill, columns: Sequence[str] = FIGURES) -> dict[str, object]:
    """The bill as JSON has it."""
    lines = [{**dict(zip(bill.by, line.group, strict=True)), **_figures(line, columns)} for line in bill.lines]
    estimated = None if bill.estimated is None else msgspec.structs.asdict(bill.estimated)
    return {
        "runs": bill.runs,
        "by": bill.by,
        "tz": bill.span.zone,
        "since": bill.span.since,
        "until": bill.span.until,
        "lines": lines,
        "total": _figures(bill.total, columns),
        "possibly_billed": bill.possibly_billed,
        "possibly_billed_usd": exact(bill.possibly_billed_usd),
        "lost": bill.lost,
        "without_usage": bill.without_usage,
        "unpriced": bill.unpriced,
        "estimated": estimated and {name: _in_json(value) for name, value in estimated.items()},
        "unfinished": bill.unfinished,
        "unread": bill.unread,
        "left_out": bill.left_out,
        "supposed": bill.supposed,
        "findings": bill.findings,
        "against": [msgspec.to_builtins(each) | {"jumped": each.jumped} for each in bill.against],
    }


def _figures(line: BillLine, columns: Sequence[str]) -> dict[str, object]:
    return {name: _in_json(figure(line, name)) for name in columns}


def _in_json(value: Value) -> int | float | str | None:
    """Money as text, so that no digit is lost."""
    return exact(value) if isinstance(value, Decimal) else value


def _parquet(bill: Bill, columns: Sequence[str]) -> bytes:
    """The lines as a Parquet file. The rest of the bill is JSON under `batchrun` in its footer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types: dict[str, pa.DataType] = {"usd": pa.decimal128(38, 12), "count": pa.int64()}
    schema = pa.schema(
        [*((key, pa.string()) for key in bill.by), *((name, types.get(kind(name), pa.float64())) for name in columns)]
    )
    rows = [
        {**dict(zip(bill.by, line.group, strict=True)), **{name: figure(line, name) for name in columns}}
        for line in bill.lines
    ]
    rest = {name: value for name, value in tree(bill, columns).items() if name != "lines"}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata({"batchrun": msgspec.json.encode(rest)})), sink)
    return bytes(sink.getvalue().to_pybytes())


SHOWN = (
    *("runs", "pending", "rows", "ok_share", "cost_usd", "cost_per_1000_rows_usd", "wasted_usd"),
    *("prompt_tokens", "cached_share", "completion_tokens", "attempts_per_row", "p50_latency_s", "p95_latency_s"),
)
"""The figures shown to people by default."""

HEADINGS = {
    "ok_share": "ok share",
    "cost_usd": "cost $",
    "cost_per_1000_rows_usd": "$ / 1,000 rows",
    "cost_per_ok_usd": "$ / ok answer",
    "wasted_usd": "wasted $",
    "possibly_billed_usd": "possibly billed $",
    "expected_usd": "estimate $",
    "compared_usd": "its cost $",
    "saved_usd": "saved $",
    "prompt_tokens": "tokens in",
    "completion_tokens": "tokens out",
    "cached_share": "cached",
    "attempts_per_row": "attempts / row",
    "p50_latency_s": "p50 s",
    "p95_latency_s": "p95 s",
    "p99_latency_s": "p99 s",
    "limit_share": "of the limit",
    "estimate_off": "above estimate",
}


def heading(name: str) -> str:
    """A column's name for people."""
    return HEADINGS.get(name, name.replace("_", " "))


_MARKUP = {ord(sign): f"\\{sign}" for sign in "\\|`*<>[]"} | {ord("\n"): " ", ord("\r"): " "}
"""Escapes: the name of a job or model must not act as markup."""


def with_total(bill: Bill, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The header, a row of cells for each line, and the total."""
    total = msgspec.structs.replace(bill.total, group=("total", *[""] * (len(bill.by) - 1)))
    lines = ((*line.group, *(cell(figure(line, name), name) for name in columns)) for line in (*bill.lines, total))
    return [(*bill.by, *map(heading, columns)), *lines]


def cell(value: Value, name: str) -> str:
    if value is None:
        return "unknown" if name == "cost_usd" else "–"
    match kind(name):
        case "usd":
            return f"{value:,.6f}"
        case "share":
            return f"{100 * value:.1f} %"
        case "seconds":
            return f"{value:,.2f}"
        case "ratio":
            return f"{value:.3f}"
    return f"{value:,}"


def remarks(bill: Bill) -> Iterator[str]:
    """The costs that the figures do not cover, a line each."""
    if bill.supposed is not None:
        yield _one_line(bill.supposed)
    if bill.possibly_billed:
        yield possibly_billed(bill.possibly_billed, bill.lost, bill.possibly_billed_bound)
    for model, attempts in bill.unpriced.items():
        yield f"no known price for {plural(attempts, 'attempt')} of {model}: not included in cost_usd"
    for missing in bill.without_usage:
        yield (
            f"without usage: {plural(missing.answers, 'answer')} of {missing.job}, not included in cost_usd; "
            f"about {missing.offline_prompt_tokens:,} tokens in, {missing.offline_completion_tokens:,} out "
            "by an offline count"
        )
    if bill.estimated is not None:
        known, runs = bill.estimated, plural(bill.estimated.runs, "complete run")
        yield f"estimate: ${known.expected_usd:,.6f} for {runs} that cost ${known.cost_usd:,.6f}"
    if bill.unfinished:
        more = f" and {len(bill.unfinished) - 5:,} more" if len(bill.unfinished) > 5 else ""
        yield f"not complete: {', '.join(map(_one_line, bill.unfinished[:5]))}{more}"
    if bill.unread and bill.unread < bill.runs:
        yield f"latency: without {plural(bill.unread, 'run')} whose rows can't be read"
    if (span := bill.span) != DaySpan():
        ends = (f" from {span.since}" if span.since else "") + (f" to {span.until}" if span.until else "")
        yield f"days are in {span.zone}{'; only money spent' + ends if ends else ''}"
    for each in bill.left_out:
        yield f"left out: {each.path}: {each.why}"
    for finding in bill.findings:
        yield f"finding ({finding.name}): {finding.job}: {_one_line(finding.text)}; {_one_line(finding.advice)}"
    for compared in bill.against:
        jumps, nights = compared.jumps, plural(len(compared.before), "run")
        yield f"against {nights} of {compared.job}: {len(compared.jumped):,} of {len(jumps):,} figures jumped"
        yield from (f"jumped: {_one_line(drift.in_words(jump))}" for jump in jumps if jump.jumped)


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")
