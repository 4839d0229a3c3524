"""Two runs over the same questions, row by row: for a new prompt or model before it goes to the whole."""

from collections import Counter
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute

from batchrun.errors import InputError
from batchrun.report import run_rows
from batchrun.report.run_rows import Result

pc: Any = pyarrow.compute  # its stubs know less than it does

MOST_EXAMPLES = 20


class Example(msgspec.Struct, frozen=True):
    """A row whose answer changed."""

    id: str
    before: str | None
    after: str | None


class Comparison(msgspec.Struct, frozen=True):
    """Of the rows in both (`both`), how many changed, by field; and what both cost where both costs are known.

    `by` is the column that says which rows are the same; `repeated` counts rows left out because their id came twice.
    """

    by: str
    both: int
    only_before: int
    only_after: int
    repeated: int
    changed: dict[str, int]
    statuses: dict[str, int]
    before_usd: Decimal
    after_usd: Decimal
    priced: int
    examples: tuple[Example, ...]


def compare(before: Result, after: Result, by: str | None, examples: int = MOST_EXAMPLES) -> Comparison:
    """The rows of both, aligned. Both results' answers are held in memory.

    Raises:
        InputError: a result has no such column.
    """
    key = by or _common_id(before, after)
    one, other = _rows(before, key), _rows(after, key)
    (one, left), (other, right) = _unique(one), _unique(other)
    places = pc.index_in(other["id"], value_set=one["id"].combine_chunks())
    both_after = other.filter(pc.is_valid(places))
    both_before = one.take(pc.drop_null(places))
    names = [name for name in one.column_names if name in other.column_names and name not in ("id", "cost_usd")]
    fields = {name: _changed(both_before[name], both_after[name]) for name in names}
    differs = fields["content"]
    for name, column in fields.items():
        if name in ("status", "function_call") or name.startswith("parsed"):
            differs = pc.or_(differs, column)
    priced = pc.and_(pc.is_valid(both_before["cost_usd"]), pc.is_valid(both_after["cost_usd"]))
    return Comparison(
        by=key,
        both=both_after.num_rows,
        only_before=one.num_rows - both_after.num_rows,
        only_after=other.num_rows - both_after.num_rows,
        repeated=left + right,
        changed={name: pc.sum(column).as_py() or 0 for name, column in fields.items()},
        statuses=_statuses(both_before, both_after),
        before_usd=_sum(both_before["cost_usd"].filter(priced)),
        after_usd=_sum(both_after["cost_usd"].filter(priced)),
        priced=pc.sum(priced).as_py() or 0,
        examples=_examples(both_before.filter(differs), both_after.filter(differs), examples),
    )


def _common_id(before: Result, after: Result) -> str:
    """The column that names rows in both: one called like an id; else their position."""
    for name in before.inputs:
        lower = name.lower()
        if name in after.inputs and (lower in ("id", "uuid", "key", "custom_id") or lower.endswith("_id")):
            return name
    return "row"


_OWN = ["status", "content", "function_call", "parsed", "cost_usd"]


def _rows(result: Result, key: str) -> pa.Table:
    """The rows' id as text, and what is compared of them: a typed answer field by field."""
    if key != "row" and key not in result.inputs:
        raise InputError(f"{result.files[0]}: has no column {key} ({', '.join([*result.inputs, 'row'])})")
    own, inputs = ([*_OWN, "row"], []) if key == "row" else (_OWN, [key])
    table = pa.concat_tables(run_rows.tables(result, own, inputs))
    columns: dict[str, Any] = {"id": pc.cast(table[key], pa.large_string())}
    columns |= {name: table[name] for name in ("status", "content", "cost_usd")}
    columns["function_call"] = pc.struct_field(table["function_call"], "arguments")
    type_ = table["parsed"].type
    if pa.types.is_struct(type_):
        for place in range(type_.num_fields):
            columns[f"parsed.{type_.field(place).name}"] = pc.struct_field(table["parsed"], [place])
    else:
        columns["parsed"] = table["parsed"]
    return pa.table(columns)


def _unique(table: pa.Table) -> tuple[pa.Table, int]:
    """The rows whose id is there and comes once, and how many are left out."""
    counts = pc.value_counts(table["id"].combine_chunks())
    once = counts.field("values").filter(pc.equal(counts.field("counts"), 1))
    kept = table.filter(pc.and_(pc.is_valid(table["id"]), pc.is_in(table["id"], value_set=once)))
    return kept, table.num_rows - kept.num_rows


def _changed(one: Any, other: Any) -> Any:
    """For each row whether the values differ; null equals null."""
    one, other = _comparable(one), _comparable(other)
    same = pc.fill_null(pc.equal(one, other), False)
    return pc.invert(pc.or_(same, pc.and_(pc.is_null(one), pc.is_null(other))))


def _comparable(column: Any) -> Any:
    type_ = column.type
    if pa.types.is_nested(type_):
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.large_string())])
    if pa.types.is_floating(type_) or pa.types.is_integer(type_):
        return pc.cast(column, pa.float64(), safe=False)
    return pc.cast(column, pa.large_string())


def _statuses(before: pa.Table, after: pa.Table) -> dict[str, int]:
    """How often each status became which."""
    pairs = pa.table({"before": before["status"], "after": after["status"]}).group_by(["before", "after"])
    counts: Counter[str] = Counter()
    for each in pairs.aggregate([([], "count_all")]).to_pylist():
        counts[f"{each['before']} → {each['after']}"] = each["count_all"]
    return dict(counts.most_common())


def _sum(column: Any) -> Decimal:
    total: Decimal | None = pc.sum(column).as_py()
    return total or Decimal(0)


def _examples(before: pa.Table, after: pa.Table, most: int) -> tuple[Example, ...]:
    """Changed rows, spread over all of them."""
    step = max(1, after.num_rows // most) if most else 1
    chosen = pa.array(list(range(0, after.num_rows, step))[:most], pa.int64())
    one, other = before.take(chosen), after.take(chosen)
    texts = zip(one["id"].to_pylist(), _answers(one), _answers(other), strict=True)
    return tuple(Example(str(id_), one_said, other_said) for id_, one_said, other_said in texts)


def _answers(table: pa.Table) -> list[str | None]:
    """What each row answered; its status where it has no text."""
    columns = (table[name].to_pylist() for name in ("content", "function_call", "status"))
    return [content or call or f"({status})" for content, call, status in zip(*columns, strict=True)]


def in_words(comparison: Comparison) -> list[str]:
    """The comparison for people."""
    both = comparison.both
    lines = [
        f"{both:,} rows in both, by {comparison.by}; {comparison.only_before:,} only in the first, "
        f"{comparison.only_after:,} only in the second"
    ]
    if comparison.repeated:
        lines.append(f"{comparison.repeated:,} rows are left out: their id is empty or not theirs alone")
    for name, count in comparison.changed.items():
        share = f"{count / both:.1%}" if both else "–"
        lines.append(f"  {name}: {count:,} changed ({share})")
    lines += [f"  {change}: {count:,}" for change, count in comparison.statuses.items()]
    lines.append(_cost(comparison))
    for example in comparison.examples:
        lines += [example.id, f"  − {_short(example.before)}", f"  + {_short(example.after)}"]
    return lines


def _cost(comparison: Comparison) -> str:
    if not comparison.priced:
        return "cost: unknown in one of them or both"
    difference = comparison.after_usd - comparison.before_usd
    share = f" ({difference / comparison.before_usd:+.1%})" if comparison.before_usd else ""
    sign = "+" if difference >= 0 else "−"
    return (
        f"cost: ${comparison.before_usd:,.6f} → ${comparison.after_usd:,.6f}, {sign}${abs(difference):,.6f}{share}, "
        f"over {comparison.priced:,} rows of known cost"
    )


def _short(text: str | None) -> str:
    shown = "–" if text is None else text.replace("\n", "⏎")
    return shown if len(shown) <= 200 else shown[:200] + "…"
