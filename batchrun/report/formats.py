"""A bill as text for people, spreadsheets and programs. Each form says the same: figures, what is beyond them, and what
was left out. PURE, but for looking at what a target is.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import JobError
from batchrun.report.bill import FIGURES, Bill, BillLine
from batchrun.report.summary import known_cost, lost_in_words, plural
from batchrun.rundir import RunDirectory

ENDINGS = {".txt": "table", ".md": "markdown", ".csv": "csv", ".json": "json", ".parquet": "parquet"}
"""What the ending of a file's name says of the form."""

FORMS = tuple(ENDINGS.values())


def form_of(target: Path | None, form: str | None) -> str:
    """The form that is asked for by name, or by the target's ending.

    Raises:
        JobError: the ending says nothing, or something else than the name; or Parquet is wanted on the terminal.
    """
    if target is None:
        if form == "parquet":
            raise JobError("--format parquet needs a file: name it with -o")
        return form or "table"
    said = ENDINGS.get(target.suffix.lower())
    if said is None and form is None:
        raise JobError(f"-o {target}: its ending says no format; known are {', '.join(ENDINGS)}, or give --format")
    if said is not None and form is not None and said != form:
        raise JobError(f"-o {target}: its ending says {said}, --format says {form}; give one of them")
    return form or said or "table"


def require_no_input(target: Path | None, paths: Sequence[Path]) -> None:
    """Nothing, if writing the bill there destroys no run.

    Raises:
        JobError: the target is one of the paths, or a file of a run.
    """
    if target is None:
        return
    where = target.resolve()
    in_a_run = RunDirectory(where.parent).checkpoint.exists() and where.exists()
    if in_a_run or where in [path.resolve() for path in paths]:
        raise JobError(f"-o {target}: is a file that the bill is made from; name another")


def render(bill: Bill, form: str) -> bytes:
    """The bill in one of `FORMS`; text is UTF-8 and ends in a newline."""
    match form:
        case "csv":
            return _csv(bill).encode()
        case "json":
            return msgspec.json.format(msgspec.json.encode(_tree(bill)), indent=2) + b"\n"
        case "parquet":
            return _parquet(bill)
        case "markdown":
            return _markdown(bill).encode()
        case _:
            return _table(bill).encode()


def _rows(bill: Bill) -> Iterator[tuple[str, ...]]:
    yield (*bill.by, *FIGURES)
    for line in bill.lines:
        values = (_figure(line, name) for name in FIGURES)
        yield (*line.group, *("" if value is None else _exact(value) for value in values))


def _csv(bill: Bill) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_guarded(cell) for cell in row] for row in _rows(bill))
    return text.getvalue()


def _exact(value: int | Decimal) -> str:
    """Every digit, and no exponent."""
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _guarded(cell: str) -> str:
    """The cell as text even for a spreadsheet, which would run what begins like a formula."""
    return "'" + cell if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell


def _tree(bill: Bill) -> dict[str, object]:
    lines = [{**dict(zip(bill.by, line.group, strict=True)), **_figures(line)} for line in bill.lines]
    estimated = None if bill.estimated is None else msgspec.structs.asdict(bill.estimated)
    return {
        "runs": bill.runs,
        "by": bill.by,
        "lines": lines,
        "total": _figures(bill.total),
        "possibly_billed": bill.possibly_billed,
        "possibly_billed_usd": _exact(bill.possibly_billed_usd),
        "lost": bill.lost,
        "without_usage": bill.without_usage,
        "unpriced": bill.unpriced,
        "estimated": estimated and {name: _in_json(value) for name, value in estimated.items()},
        "left_out": bill.left_out,
    }


def _figures(line: BillLine) -> dict[str, object]:
    return {name: _in_json(_figure(line, name)) for name in FIGURES}


def _in_json(value: int | Decimal | None) -> int | str | None:
    """Money as text, so that no digit is lost."""
    return _exact(value) if isinstance(value, Decimal) else value


def _parquet(bill: Bill) -> bytes:
    """The lines as a Parquet file; the sum, and what is beyond it, are the entry `batchrun` of its footer, as JSON."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: pa.decimal128(38, 12) if name.endswith("_usd") else pa.int64() for name in FIGURES}
    schema = pa.schema([*((key, pa.string()) for key in bill.by), *types.items()])
    rows = [
        {**dict(zip(bill.by, line.group, strict=True)), **{name: _figure(line, name) for name in FIGURES}}
        for line in bill.lines
    ]
    rest = {name: value for name, value in _tree(bill).items() if name != "lines"}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema.with_metadata({"batchrun": msgspec.json.encode(rest)})), sink)
    return bytes(sink.getvalue().to_pybytes())


_SHOWN = ("rows", "attempts", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_usd", "wasted_usd")


def _table(bill: Bill) -> str:
    """Columns in line, numbers to the right, the sum last."""
    cells = _with_total(bill)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    names = len(bill.by)
    lines = [
        "  ".join(
            cell.ljust(width) if column < names else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, *_remarks(bill)]) + "\n"


def _markdown(bill: Bill) -> str:
    """The same as a table of Markdown, what is beyond it as a list."""
    header, *body = ([cell.translate(_MARKUP) for cell in row] for row in _with_total(bill))
    rule = [*["---"] * len(bill.by), *["---:"] * len(_SHOWN)]
    lines = [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
    remarks = [f"- {remark.translate(_MARKUP)}" for remark in _remarks(bill)]
    return "\n".join([*lines, *(["", *remarks] if remarks else [])]) + "\n"


_MARKUP = {ord(sign): f"\\{sign}" for sign in "\\|`*<>[]"} | {ord("\n"): " ", ord("\r"): " "}
"""What a job's or model's name must not do to a page."""


def _with_total(bill: Bill) -> list[tuple[str, ...]]:
    lines = [(*line.group, *_cells(line)) for line in bill.lines]
    total = ("total", *[""] * (len(bill.by) - 1), *_cells(bill.total))
    return [(*bill.by, *_SHOWN), *lines, total]


def _cells(line: BillLine) -> list[str]:
    return [_cell(_figure(line, name)) for name in _SHOWN]


def _cell(value: int | Decimal | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.6f}" if isinstance(value, Decimal) else f"{value:,}"


def _figure(line: BillLine, name: str) -> int | Decimal | None:
    """None for a cost of which nothing is known."""
    if name == "cost_usd":
        return known_cost(line.cost_usd, line.unpriced + line.without_usage)
    value: int | Decimal = getattr(line, name)
    return value


def _remarks(bill: Bill) -> Iterator[str]:
    if bill.possibly_billed:
        yield (
            f"possibly billed beyond that: {plural(bill.possibly_billed, 'attempt')} without a known end, "
            f"at most ${bill.possibly_billed_usd:,.6f}"
        )
    if bill.lost:
        yield lost_in_words(bill.lost)
    for model, attempts in bill.unpriced.items():
        yield f"no known price for {plural(attempts, 'attempt')} of {model}: not in cost_usd"
    for missing in bill.without_usage:
        yield (
            f"without usage: {plural(missing.answers, 'answer')} of {missing.job}, not in cost_usd; "
            f"about {missing.offline_prompt_tokens:,} tokens in, {missing.offline_completion_tokens:,} out "
            "by an offline count"
        )
    if bill.estimated is not None:
        known, runs = bill.estimated, plural(bill.estimated.runs, "complete run")
        yield f"estimate: ${known.expected_usd:,.6f} for {runs} that cost ${known.cost_usd:,.6f}"
    for each in bill.left_out:
        yield f"left out: {each.path}: {each.why}"
