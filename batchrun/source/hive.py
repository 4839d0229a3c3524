"""Reads the keys of folders named `key=value`, as Spark, Hive, DuckDB and pandas write them, as columns. PURE.

A file's keys are those of the unbroken chain of such folders directly above it. A path to the file, its folder or a
glob gives the same columns.
"""

import re
from urllib.parse import unquote

import pyarrow as pa

from batchrun.errors import writable
from batchrun.storage.objects import InputFile

Keys = dict[str, int | str | None]

NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"0|-?[1-9]\d{0,17}")  # only integers in their shortest form: "007" stays text


def keys_of(files: tuple[InputFile, ...]) -> list[Keys]:
    """The keys of each file's folders, outermost first.

    A key is an integer if all its values in all files are integers in their shortest form; else it is text.
    """
    found: list[Keys] = [dict(texts_of(file)) for file in files]
    for name in {name for keys in found for name in keys}:
        values = [keys[name] for keys in found if keys.get(name) is not None]
        if values and all(_INTEGER.fullmatch(str(value)) for value in values):
            for keys in found:
                if (value := keys.get(name)) is not None:
                    keys[name] = int(value)
    return found


def texts_of(file: InputFile) -> dict[str, str | None]:
    """The keys of the file's folders as text, outermost first; null is None."""
    keys: dict[str, str | None] = {}
    for folder in file.parents:
        name, equals, value = folder.name.partition("=")
        if not (name and equals):
            break
        keys.setdefault(writable(unquote(name)), None if value == NULL else writable(unquote(value)))
    return dict(reversed(keys.items()))


def fields_of(all_keys: list[Keys]) -> dict[str, pa.DataType]:
    """The keys of all files with their types, in order of appearance."""
    types: dict[str, pa.DataType] = {}
    for keys in all_keys:
        for name, value in keys.items():
            if isinstance(value, int):
                types[name] = pa.int64()
            else:
                types.setdefault(name, pa.string())
    return types
