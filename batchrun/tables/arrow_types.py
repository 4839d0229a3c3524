"""A JSON schema as the type of the column `parsed`, and values as that type. PURE.

| the schema, null apart | column |
| --- | --- |
| `string` | large_string |
| `integer`; `number` | int64; double |
| `boolean` | bool |
| `enum` or `const` of strings | dictionary<int32, string>, its values in the schema's order |
| `object` with `properties`, not open by `additionalProperties` or patterns | struct of all its properties |
| `array` of one kind of items | list |
| `$ref` within the schema, one `allOf`, `anyOf` or `oneOf` of one type | that type |
| all else: any value, different shapes, a schema within itself, tuples, maps, objects without properties | JSON text |

The column is a struct where the whole schema is an object with properties, else it is JSON text. Every field may be
null: absent and null are the same there.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any
from urllib.parse import unquote

import msgspec
import pyarrow as pa

Schema = Mapping[str, Any]

MAX_PLACES = 1_000
"""Fields in all. A Parquet footer has an entry for each in every row group; and definitions that use each other twice
double with every level.
"""

MAX_DEPTH = 16  # bounds the recursion: what is deeper is JSON text

INT64 = range(-(2**63), 2**63)

_JSON_TEXT = pa.large_string()
_encode = msgspec.json.Encoder().encode


class Column(msgspec.Struct, frozen=True):
    """The type of one place. `kind`: json, string, int, number, bool, enum, struct or list.

    `values` are an enum's; `fields` a struct's, or a list's only one.
    """

    kind: str
    values: tuple[str, ...] = ()
    fields: "tuple[tuple[str, Column], ...]" = ()

    def type(self) -> pa.DataType:
        match self.kind:
            case "struct":
                return pa.struct([pa.field(name, field.type()) for name, field in self.fields])
            case "list":
                return pa.list_(pa.field("element", self.fields[0][1].type()))  # Parquet's name
            case _:
                return _TYPES[self.kind]


_TYPES: Mapping[str, pa.DataType] = {
    "json": _JSON_TEXT,
    "string": pa.large_string(),
    "int": pa.int64(),
    "number": pa.float64(),
    "bool": pa.bool_(),
    "enum": pa.dictionary(pa.int32(), pa.string()),
}

JSON = Column("json")
STRING, INT, NUMBER, BOOL = Column("string"), Column("int"), Column("number"), Column("bool")


def column_of(schema: Schema | None) -> Column:
    """The type of `parsed` for answers that fit this schema; None: for any JSON."""
    if schema is None or any(_has_base(value) for value in schema.values()):
        return JSON  # references would be resolved against another place
    try:
        column = _Reader(schema).column(schema, ())
    except (_TooLarge, RecursionError):
        return JSON
    return column if column.kind == "struct" else JSON


def _has_base(value: Any) -> bool:
    if isinstance(value, dict):
        return isinstance(value.get("$id"), str) or any(map(_has_base, value.values()))
    return isinstance(value, list) and any(map(_has_base, value))


class _TooLarge(Exception):
    """The schema has more places than `MAX_PLACES`."""


_SIMPLE = {"string": STRING, "integer": INT, "number": NUMBER, "boolean": BOOL}
_OPEN = ("patternProperties", "propertyNames", "unevaluatedProperties", "dependentSchemas")


class _Reader:
    """Reads one schema; `_places` counts what was made of it."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._places = 0

    def column(self, schema: Any, within: tuple[str, ...]) -> Column:
        """The type of the values that fit `schema`; `within` are the references that led here.

        A value that fits the whole fits each of its parts, so the first part that says a type decides.
        """
        self._places += 1
        if self._places > MAX_PLACES:
            raise _TooLarge
        if not isinstance(schema, dict) or len(within) > MAX_DEPTH:
            return JSON
        if "const" in schema or "enum" in schema:
            return _of_values(schema["enum"] if "enum" in schema else [schema["const"]])
        if "type" in schema:
            return self._of_types(schema, within)
        if "$ref" in schema:
            reference = schema["$ref"]
            if not isinstance(reference, str) or reference in within:
                return JSON  # a schema within itself has no end
            found = _resolved(self._root, reference)
            return JSON if found is None else self.column(found, (*within, reference))
        for keyword in ("anyOf", "oneOf"):
            if isinstance(options := schema.get(keyword), list):
                return _common([self.column(option, (*within, "")) for option in options if not _is_null(option)])
        if isinstance(parts := schema.get("allOf"), list) and len(parts) == 1:
            return self.column(parts[0], (*within, ""))
        return JSON

    def _of_types(self, schema: Schema, within: tuple[str, ...]) -> Column:
        """The column of a schema that names its types."""
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        names = [name for name in names if name != "null"]
        if names == ["object"]:
            properties = schema.get("properties")
            is_open = schema.get("additionalProperties", False) is not False or any(name in schema for name in _OPEN)
            if not properties or is_open:
                return JSON
            fields = ((name, self.column(field, (*within, ""))) for name, field in properties.items())
            return Column("struct", fields=tuple(fields))
        if names == ["array"]:
            if "prefixItems" in schema or isinstance(schema.get("items"), list):
                return JSON
            return Column("list", fields=(("element", self.column(schema.get("items"), (*within, ""))),))
        return _common([_SIMPLE.get(name, JSON) for name in names])


def _resolved(root: Schema, reference: str) -> Any:
    """The target of a reference within the schema (JSON Pointer in a fragment, RFC 6901); None if it is elsewhere."""
    place, _, fragment = reference.partition("#")
    if place or (fragment and not fragment.startswith("/")):
        return None
    found: Any = root
    for step in unquote(fragment).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def _is_null(schema: Any) -> bool:
    """Whether the schema allows null alone: beside another type it only says that the column may be null."""
    if not isinstance(schema, dict):
        return False
    return schema.get("type") in ("null", ["null"]) or schema.get("enum") == [None] or schema.get("const", ...) is None


def _of_values(values: Any) -> Column:
    """The type of the values of an `enum` or a `const`."""
    kinds = {type(value) for value in values if value is not None} if isinstance(values, list) else set()
    if kinds == {str}:
        return Column("enum", tuple(dict.fromkeys(value for value in values if value is not None)))
    if kinds == {bool}:
        return BOOL
    if kinds == {int}:
        return INT
    return NUMBER if kinds and kinds <= {int, float} else JSON


def _common(columns: Sequence[Column]) -> Column:
    """The one type that all of these are, or JSON text."""
    kinds = {column.kind for column in columns}
    if kinds == {"enum"}:
        return Column("enum", tuple(dict.fromkeys(value for column in columns for value in column.values)))
    if kinds == {"enum", "string"}:
        return STRING
    if kinds == {"int", "number"}:
        return NUMBER
    return columns[0] if columns and all(column == columns[0] for column in columns) else JSON


def array_of(column: Column, texts: Sequence[str | None]) -> "tuple[pa.Array[Any], dict[int, str]]":
    """The JSON texts as the column's type, and for each place in `texts` what has no place in it.

    That is a part of a value that the type can't hold: an integer beyond 64 bits, a field that the schema does not
    name, another type (an answer to another schema). It is null, or left out; the rest is there.
    """
    problems: dict[int, str] = {}
    if column.kind == "json":
        return pa.array(list(texts), _JSON_TEXT), problems
    values = [None if text is None else msgspec.json.decode(text) for text in texts]
    return _array(column, values, range(len(values)), "$", problems), problems


def _array(
    column: Column, values: Sequence[Any], rows: Sequence[int], place: str, problems: dict[int, str]
) -> "pa.Array[Any]":
    """`values` as an array; `rows[k]` is the row of `values[k]`, for its problem."""
    held: list[Any]  # what the column can hold of each value
    if column.kind == "enum":
        index = {value: number for number, value in enumerate(column.values)}
        held = [index.get(value) if isinstance(value, str) else None for value in values]
    else:
        hold = _HOLD[column.kind]
        held = [hold(value) for value in values]
    for kept, value, row in zip(held, values, rows, strict=True):
        if kept is None and value is not None:
            shown = _encode(value).decode()
            shown = shown if len(shown) <= 40 else shown[:40] + "…"
            problems.setdefault(row, f"{place} can't hold {shown}")

    nulls = pa.array([value is None for value in held], pa.bool_())
    type_: Any = column.type()
    match column.kind:
        case "struct":
            names = {name for name, _ in column.fields}
            for value, row in zip(held, rows, strict=True):
                if unknown := [name for name in value or () if name not in names]:
                    problems.setdefault(row, f"{place}.{unknown[0]} is not in the schema"[:200])
            children = []
            for name, field in column.fields:
                members = [None if value is None else value.get(name) for value in held]
                children.append(_array(field, members, rows, f"{place}.{name}", problems))
            fields = [type_.field(number) for number in range(type_.num_fields)]
            return pa.StructArray.from_arrays(children, fields=fields, mask=nulls)
        case "list":
            members = [member for value in held for member in value or ()]
            their_rows = [row for value, row in zip(held, rows, strict=True) for _ in value or ()]
            elements = _array(column.fields[0][1], members, their_rows, f"{place}[]", problems)
            offsets = pa.array(list(accumulate((len(value or ()) for value in held), initial=0)), pa.int32())
            return pa.ListArray.from_arrays(offsets, elements, type=type_, mask=nulls)
        case "enum":
            return pa.DictionaryArray.from_arrays(pa.array(held, pa.int32()), pa.array(column.values, pa.string()))
        case _:
            return pa.array(held, column.type())


def _integer(value: Any) -> int | None:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())  # 1.0 is an integer in JSON
    if isinstance(value, bool) or not whole:
        return None
    return int(value) if int(value) in INT64 else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


_HOLD: Mapping[str, Callable[[Any], Any]] = {
    "struct": lambda value: value if isinstance(value, dict) else None,
    "list": lambda value: value if isinstance(value, list) else None,
    "json": lambda value: None if value is None else _encode(value).decode(),
    "string": lambda value: value if isinstance(value, str) else None,
    "int": _integer,
    "number": _number,
    "bool": lambda value: value if isinstance(value, bool) else None,
}
