"""JSONL rows as typed Arrow columns: one schema for a whole run, and no value lost. PURE over bytes.

What was seen at a place (a column, a field, a list's elements) is only ever added to, so the final types do not
depend on the order of the rows:

| seen, besides null and absence | column |
| --- | --- |
| nothing | string (all null: Parquet's null type is refused by other readers) |
| one of boolean, string, integer in 64 bits | bool, string, int64 |
| decimals, or decimals and integers within ±2^53 | double |
| objects | struct of all their fields |
| arrays | list of what all their elements have in common |
| anything mixed, larger integers, objects that are always empty | JSON text: the value's own source bytes |
| more than 100 keys in all, or nested deeper than 8 | JSON text for the whole column |

Strings stay strings: nothing is guessed to be a time. In a struct and on the top level a missing field is null.
"""

from collections.abc import Callable, Iterator
from types import NoneType
from typing import cast

import msgspec
import pyarrow as pa

from batchrun.errors import InputError

MAX_COLUMNS = 5_000  # each costs ~1 KB per row group in Parquet's footer; more are data used as keys
MAX_KEYS = 100  # objects with more are maps, not records
MAX_DEPTH = 8  # a value that is nested deeper is a document, not a record
EXACT = 2**53  # doubles hold every integer up to here

_KINDS = {NoneType: "null", bool: "bool", int: "int", float: "float", str: "string", dict: "object", list: "array"}
_SCALARS: dict[frozenset[str], pa.DataType] = {
    frozenset(): pa.string(),
    frozenset({"bool"}): pa.bool_(),
    frozenset({"string"}): pa.string(),
    frozenset({"int"}): pa.int64(),
    frozenset({"wide"}): pa.int64(),
    frozenset({"int", "wide"}): pa.int64(),
    frozenset({"float"}): pa.float64(),
    frozenset({"int", "float"}): pa.float64(),
}

_decode = msgspec.json.Decoder().decode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_elements = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Seen(msgspec.Struct, omit_defaults=True):
    """The types seen at one place.

    `kinds` in order of appearance: null, bool, int (within ±2^53), wide (int64), huge (beyond), float, string,
    object, array, or vast: too many keys or too deep, final for a column.
    """

    kinds: list[str] = []
    fields: dict[str, "Seen"] = {}
    element: "Seen | None" = None

    def note(self, value: object, depth: int = 0) -> bool:
        """`value` is among what was seen, down to one level below `MAX_DEPTH`; True if that made a new place."""
        kind = _KINDS[type(value)]
        if isinstance(value, int) and not -EXACT <= value <= EXACT:
            kind = "wide" if -(2**63) <= value < 2**63 else "huge"
        if kind not in self.kinds:
            self.kinds.append(kind)
        if depth > MAX_DEPTH:
            return False
        grown = False
        if isinstance(value, dict):
            for name, member in value.items():
                field = self.fields.get(name)
                if field is None:
                    field, grown = self.fields.setdefault(name, Seen()), True
                grown |= field.note(member, depth + 1)
        elif isinstance(value, list):
            if self.element is None:
                self.element, grown = Seen(), True
            for member in value:
                grown |= self.element.note(member, depth + 1)
        return grown

    def children(self) -> Iterator["Seen"]:
        """The places right below."""
        yield from self.fields.values()
        if self.element is not None:
            yield self.element

    def keys(self) -> int:
        """The fields of this place and of all below."""
        return len(self.fields) + sum(child.keys() for child in self.children())

    def depth(self) -> int:
        """The levels of nesting below this place."""
        return max((1 + child.depth() for child in self.children()), default=0)

    def arrow_type(self) -> pa.DataType | None:
        """The type of this place by the module's table; None = JSON text."""
        kinds = frozenset(self.kinds) - {"null"}
        if kinds == {"object"} and self.fields:
            return pa.struct([(name, seen.arrow_type() or pa.string()) for name, seen in self.fields.items()])
        if kinds == {"array"} and self.element is not None:
            return pa.list_(pa.field("element", self.element.arrow_type() or pa.string()))  # Parquet's name
        return _SCALARS.get(kinds)

    def holds_text(self) -> bool:
        """Whether JSON text is here or below."""
        return self.arrow_type() is None or any(child.holds_text() for child in self.children())


class ColumnTypes:
    """The types of a run's JSONL columns, learned row by row."""

    def __init__(self, columns: dict[str, Seen] | None = None) -> None:
        self._columns = columns or {}
        self._plain: dict[str, set[type]] = {}  # the types of plain values that were noted already, by column

    def observe(self, row: dict[str, object]) -> None:
        """`row` fits the schema. 1 µs for five plain columns (measured).

        Raises:
            InputError: the rows have more than `MAX_COLUMNS` different keys.
        """
        for name, value in row.items():
            kind, plain = type(value), self._plain.get(name)
            if plain is not None and kind in plain and (kind is not int or -EXACT <= value <= EXACT):  # type: ignore[operator]
                continue  # nearly all values
            seen = self._columns.get(name)
            if seen is None:
                seen = self._columns[name] = Seen()
                if len(self._columns) > MAX_COLUMNS:
                    raise InputError(f"the rows have more than {MAX_COLUMNS:,} different keys; nest data used as keys")
            if kind is dict or kind is list:
                has_grown = "vast" not in seen.kinds and seen.note(value)
                if has_grown and (seen.keys() > MAX_KEYS or seen.depth() > MAX_DEPTH):  # better kept as JSON text
                    seen.kinds, seen.fields, seen.element = ["vast"], {}, None
                    self._plain.pop(name, None)
            elif _KINDS[kind] not in seen.kinds or (isinstance(value, int) and not -EXACT <= value <= EXACT):
                seen.note(value)
            else:
                self._plain.setdefault(name, set()).add(kind)

    def schema(self) -> pa.Schema:
        """One nullable field per column, in order of first appearance."""
        return pa.schema([(name, seen.arrow_type() or pa.string()) for name, seen in self._columns.items()])

    def to_json(self) -> str:
        """The state as plain JSON; `from_json` gives an equal value that can observe more."""
        return msgspec.json.encode(self._columns).decode()

    @classmethod
    def from_json(cls, text: str) -> "ColumnTypes":
        """The types that `to_json` wrote.

        Raises:
            msgspec.MsgspecError: `text` is something else.
        """
        return cls(msgspec.json.decode(text, type=dict[str, Seen]))

    def reader(self) -> Callable[[bytes], dict[str, object]]:
        """A function from a line to its row with JSON text where the schema has it."""
        if not any(seen.holds_text() for seen in self._columns.values()):
            return msgspec.json.Decoder(dict[str, object]).decode
        return _struct_reader(self._columns)


def lines_to_table(lines: list[bytes], types: ColumnTypes) -> pa.Table:
    """The lines' values in the columns of `types.schema()`, in order.

    1 µs a row of 5 plain columns, 4.4 µs of 7 with JSON text among them (measured), all of it under the GIL.

    Every line must have been observed: Arrow itself would cut a decimal to a column's integers and drop a
    nested field it has no place for.

    Raises:
        InputError: a line has a key or a kind of value that was never observed.
    """
    read, schema = types.reader(), types.schema()
    try:
        rows = [read(line) for line in lines]
        if unknown := set().union(*rows).difference(schema.names):
            raise KeyError(min(unknown))
        structs = cast(pa.StructArray, pa.array(rows, pa.struct(list(schema))))
        return pa.Table.from_struct_array(structs)
    except (KeyError, TypeError, OverflowError, pa.ArrowException, msgspec.MsgspecError) as error:
        raise InputError(f"a line differs from what was checked ({error}); was the input changed?") from error


def _reader(seen: Seen) -> Callable[[msgspec.Raw], object]:
    """A function from a value's source to what Arrow takes for it."""
    if not seen.holds_text():
        return _decode
    if seen.arrow_type() is None:
        return _text
    if seen.element is None:
        struct = _struct_reader(seen.fields)
        return lambda source: None if bytes(source) == b"null" else struct(source)
    element = _reader(seen.element)
    return lambda source: None if bytes(source) == b"null" else [element(each) for each in _elements(source)]


def _struct_reader(fields: dict[str, Seen]) -> Callable[[bytes | msgspec.Raw], dict[str, object]]:
    readers = {name: _reader(seen) for name, seen in fields.items()}
    return lambda source: {name: readers[name](value) for name, value in _members(source).items()}


def _text(source: msgspec.Raw) -> str | None:
    text = str(source, "utf-8")
    return None if text == "null" else text
