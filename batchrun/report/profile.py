"""Counts over all answers of a run, made in one pass over its columns, in bounded memory."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute

from batchrun.report import latencies, run_rows
from batchrun.report.run_rows import Result

pc: Any = pyarrow.compute  # its stubs know less than it does

MOST_VALUES = 5_000
"""Distinct values of one column that are counted. A value in a large part of the rows is kept (Misra, Gries 1982)."""

SAMPLE_ROWS = 2_000
"""Numbers kept of each row group for a field's quantiles."""

LONG_CHARS = 40
"""Shorter answers are labels, which repeat by nature."""


class Field:
    """One field of the answers: its nulls, its commonest values, and a sample of its numbers."""

    def __init__(self) -> None:
        self.rows = 0
        self.nulls = 0
        self.values: Counter[str] = Counter()
        self.numbers: list[float] = []

    def add(self, column: Any) -> None:
        """Counts the field in more rows."""
        self.rows += len(column)
        self.nulls += column.null_count
        type_ = column.type
        if pa.types.is_integer(type_) or pa.types.is_floating(type_):
            known = pc.drop_null(column)
            step = max(1, len(known) // SAMPLE_ROWS)
            self.numbers += [float(value) for value in known.to_pylist()[::step]]
        elif type_ in (pa.bool_(), pa.string(), pa.large_string()) or pa.types.is_dictionary(type_):
            plain = column.cast(pa.large_string())
            self.values.update(run_rows.counts(plain))
            if len(self.values) > MOST_VALUES:
                self.values = Counter(dict(self.values.most_common(MOST_VALUES // 2)))

    def quantile(self, share: float) -> float | None:
        """A quantile of the numbers; None without any."""
        if not self.numbers:
            return None
        ordered = sorted(self.numbers)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Profile:
    """Counts over the rows of a result. `fields` are those of `parsed`, by their dotted path."""

    def __init__(self) -> None:
        self.rows = 0
        self.statuses: Counter[str] = Counter()
        self.attempts = 0
        self.prompts = Field()
        self.prompt_tokens = 0
        self.cached_tokens: int | None = None  # None: no answer reports them
        self.lengths: Counter[int] = Counter()
        self.latencies: Counter[int] = Counter()
        self.contents = Field()
        self.repeated: Counter[str] = Counter()  # how many different questions have each long answer
        self.models: Counter[tuple[str, str]] = Counter()
        self.kinds: Counter[str] = Counter()
        self.fields: dict[str, Field] = {}


_COLUMNS = (
    *("status", "content", "parsed", "model", "requested_model", "prompt_tokens", "cached_tokens", "attempts"),
    *("latency_s", "error", "request_key"),
)


def profile(result: Result) -> Profile:
    """One pass over the rows."""
    made = Profile()
    for table in run_rows.tables(result, _COLUMNS):
        made.rows += table.num_rows
        made.statuses.update(run_rows.counts(table["status"]))
        made.attempts += pc.sum(table["attempts"]).as_py() or 0
        made.prompt_tokens += pc.sum(table["prompt_tokens"]).as_py() or 0
        if (cached := pc.sum(table["cached_tokens"]).as_py()) is not None:
            made.cached_tokens = (made.cached_tokens or 0) + cached
        made.prompts.add(table["prompt_tokens"])
        made.latencies.update(latencies.buckets_of(table["latency_s"]))
        made.lengths.update(latencies.buckets_of(pc.utf8_length(table["content"])))
        made.kinds.update(run_rows.counts(pc.struct_field(table["error"], "kind")))
        answered = table.filter(pc.is_valid(table["content"]))
        made.contents.add(answered["content"])
        longer = answered.filter(pc.greater_equal(pc.utf8_length(answered["content"]), LONG_CHARS))
        groups = longer.group_by("content").aggregate([("request_key", "count_distinct")])
        for each in groups.to_pylist():
            made.repeated[each["content"]] += each["request_key_count_distinct"]
        if len(made.repeated) > MOST_VALUES:
            made.repeated = Counter(dict(made.repeated.most_common(MOST_VALUES // 2)))
        pairs = table.filter(pc.equal(table["status"], "ok")).group_by(["requested_model", "model"])
        for pair in pairs.aggregate([([], "count_all")]).to_pylist():
            made.models[pair["requested_model"], pair["model"]] += pair["count_all"]
        for name, column in _leaves(table.filter(pc.equal(table["status"], "ok"))["parsed"], ""):
            made.fields.setdefault(name, Field()).add(column)
    return made


def _leaves(column: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The fields of typed answers by dotted path. A list or JSON text is one field; only its nulls are counted."""
    type_ = column.type
    if not pa.types.is_struct(type_):
        if path:
            yield path, column
        return
    for place in range(type_.num_fields):
        name = type_.field(place).name
        yield from _leaves(pc.struct_field(column, [place]), f"{path}.{name}" if path else name)
