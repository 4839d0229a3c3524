"""Combines the schemas of many files, and casts each file's batches. PURE. Types combine only if no value is lost.

| in one file | in another | column |
| --- | --- | --- |
| all null (Arrow's null type), or missing | any type | that type |
| string | large_string, string_view, a dictionary of strings | string or large_string |
| integers of different widths; `float` | `double` | the wider |
| integers | `double` | double; an integer beyond 2^53 is an error |
| decimals of one scale; timestamps of one zone | other precision; other unit | the finer |
| structs, lists | others, with members that combine | members combined; a missing one is null |

All other pairs are errors: text and numbers, text and bytes, decimals of two scales (whose text would change).
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, TypeGuard

import pyarrow as pa

from batchrun import compute as pc
from batchrun.errors import InputError
from batchrun.storage.objects import InputFile


def schema_over(schemas: "Iterable[tuple[InputFile, pa.Schema]]") -> pa.Schema:
    """The columns of all files, in order of first appearance, each with the type that holds the values of all.

    Raises:
        InputError: names a column, two of its types, their files, and what to do.
    """
    fields: dict[str, tuple[pa.DataType, InputFile]] = {}
    for path, schema in schemas:
        for field in schema:
            known, first = fields.get(field.name, (field.type, path))
            common = _common(known, field.type)
            if common is None:
                raise InputError(
                    f"{path} has column '{field.name}' as {field.type}, {first} as {known}; no type holds both without "
                    "loss: write one of the files with the other's type, or use them as two inputs"
                )
            fields[field.name] = (common, path if common == field.type else first)
    return pa.schema([(name, type_) for name, (type_, _) in fields.items()])


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both unchanged, or None."""
    if one == other:
        return one
    one, other = plain(one), plain(other)
    if not _reads_the_same(one, other):
        return None
    try:
        pair = [pa.schema([("column", type_)]) for type_ in (one, other)]
        unified: pa.DataType = pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except pa.ArrowException:
        return None
    return unified


def plain(type_: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views, at every depth: Arrow can't unify these with plain ones."""
    if isinstance(type_, pa.DictionaryType):
        return plain(type_.value_type)
    if type_ == pa.string_view():
        return pa.large_string()
    if type_ == pa.binary_view():
        return pa.large_binary()
    if isinstance(type_, pa.RunEndEncodedType):
        return plain(type_.value_type)
    if is_view(type_):
        return pa.large_list(type_.value_field.with_type(plain(type_.value_type)))
    return with_members(type_, plain)


def is_view(type_: pa.DataType) -> "TypeGuard[pa.ListViewType[Any] | pa.LargeListViewType[Any]]":
    """True for a list view: a list whose elements need not be in order in memory."""
    return isinstance(type_, pa.ListViewType | pa.LargeListViewType)


@cache
def has_views(type_: pa.DataType) -> bool:
    """True if the type holds a list view at any depth."""
    if is_view(type_):
        return True
    return pa.types.is_nested(type_) and any(has_views(type_.field(n).type) for n in range(type_.num_fields))


def with_members(type_: pa.DataType, change: Any) -> pa.DataType:
    """A list, struct or map with the types of its members changed; any other type unchanged."""
    if pa.types.is_struct(type_):
        return pa.struct([field.with_type(change(field.type)) for field in type_.fields])
    if isinstance(type_, pa.MapType):
        item = change(type_.item_type)
        if item == type_.item_type:
            return type_  # DuckDB's map {} has keys of the null type, which `map_` rejects
        return pa.map_(type_.key_type, item)
    if isinstance(type_, pa.FixedSizeListType):
        return pa.list_(type_.value_field.with_type(change(type_.value_type)), type_.list_size)
    if isinstance(type_, pa.LargeListType):
        return pa.large_list(type_.value_field.with_type(change(type_.value_type)))
    if isinstance(type_, pa.ListType):
        return pa.list_(type_.value_field.with_type(change(type_.value_type)))
    return type_


def _reads_the_same(one: pa.DataType, other: pa.DataType) -> bool:
    """True if the common type does not change how a value of either type is written in a prompt."""
    if pa.types.is_null(one) or pa.types.is_null(other):
        return True
    if pa.types.is_decimal(one) or pa.types.is_decimal(other):
        return pa.types.is_decimal(one) and pa.types.is_decimal(other) and one.scale == other.scale
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        members = {field.name: field.type for field in other.fields}
        return all(_reads_the_same(field.type, members[field.name]) for field in one.fields if field.name in members)
    if isinstance(one, pa.ListType | pa.LargeListType) and isinstance(other, pa.ListType | pa.LargeListType):
        return _reads_the_same(one.value_type, other.value_type)
    return _kind(one) == _kind(other)


def _kind(type_: pa.DataType) -> str:
    """What values of the type look like in a prompt: types of one kind combine."""
    if pa.types.is_integer(type_) or pa.types.is_floating(type_):
        return "number"
    if pa.types.is_string(type_) or pa.types.is_large_string(type_):
        return "text"
    if pa.types.is_timestamp(type_):
        return f"timestamp {type_.tz}"
    if pa.types.is_binary(type_) or pa.types.is_large_binary(type_):
        return "bytes"
    return str(type_)


def fitted(rows: pa.RecordBatch, schema: pa.Schema, keys: dict[str, Any]) -> pa.RecordBatch:
    """The rows in the columns of `schema`. Missing columns are filled from the folders' `keys`, or are null.

    Raises:
        ValueError: a value does not fit its column's common type; names the column.
    """
    columns, names = [], set(rows.schema.names)
    for field in schema:
        if field.name not in names:
            columns.append(pa.array([keys.get(field.name)] * rows.num_rows, field.type))
            continue
        column = rows.column(field.name)
        try:
            columns.append(column if column.type == field.type else _cast(column, field.type))
        except pa.ArrowException as error:
            raise ValueError(f"column '{field.name}' as {field.type}, which other files have: {error}") from error
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _cast(column: "pa.Array[Any]", to: pa.DataType) -> "pa.Array[Any]":
    """The column in another type without loss. By way of Python where Arrow's cast loses values or is missing."""
    if pa.types.is_floating(column.type) and pa.types.is_float64(to):
        return shortest(column)
    if isinstance(column, pa.RunEndEncodedArray):
        return _cast(pc.call_function("run_end_decode", [column]), to)
    if has_views(column.type):  # Arrow's cast loses the elements of a list view within a list
        return pa.array(column.to_pylist(), to)
    try:
        return pc.cast(column, to)
    except pa.ArrowNotImplementedError:  # views within dictionaries, dictionaries within lists: polars' Categorical
        return pa.array(column.to_pylist(), to)


def shortest(column: "pa.Array[Any]") -> "pa.Array[Any]":
    """Floats of less than double precision, at any depth, as doubles with the same shortest decimal: 0.1 stays 0.1.

    A plain cast gives 0.10000000149011612, so the values are cast to text and back.
    """
    wide = _with_floats_as(column.type, pa.float32())
    if wide == column.type and _with_floats_as(column.type, pa.float64()) == column.type:
        return column
    texts = pc.cast(pc.cast(column, wide), _with_floats_as(column.type, pa.string()))
    return pc.cast(texts, _with_floats_as(column.type, pa.float64()))


def _with_floats_as(type_: pa.DataType, to: pa.DataType) -> pa.DataType:
    """The type with every float of less than double precision replaced by `to`."""
    if pa.types.is_float32(type_) or pa.types.is_float16(type_):
        return to
    return with_members(type_, lambda member: _with_floats_as(member, to))
