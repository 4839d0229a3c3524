"""Error messages for a job file in one line: the setting's path, what was expected, the nearest known name. PURE.

msgspec's messages lack three things that a person needs: which key of a dict is wrong, which values a name may have,
and which setting an unknown name probably means.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.inspect import DictType, ListType, LiteralType, StructType, Type, UnionType, type_info

Step = str | int
"""One step down from a table: a name or a list's index."""

_MESSAGE = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<at>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`$")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`$")
_STEP = re.compile(r"\[(?P<index>\d+|\.\.\.)\]|(?P<name>[^.\[\]]+)")
_TYPES = re.compile(r"(?<=xpected )`(?P<expected>[^`]*)`|(?<=got )`(?P<got>[^`]*)`")
_PLAIN = {
    **{"int": "an integer", "float": "a number", "str": "text", "bool": "true or false"},
    **{"array": "a list", "object": "a table"},
}
_ABBREVIATED = {
    **{"rps": "requests_per_second", "rpm": "requests_per_minute", "rpd": "requests_per_day"},
    "tpm": "tokens_per_minute",
}
_ANY_KEY = "..."  # how msgspec writes a dict's key


def explain(message: str, tables: Mapping[str, Any], root: type, settings: Collection[str]) -> str:
    """Rewrites `message`, from msgspec's conversion of `tables` to `root`, as `path: what was expected`."""
    match = _MESSAGE.match(message)
    what, at = (match["what"], match["at"] or "") if match else (message, "")
    steps = _steps(message, at, tables, root)
    if unknown := _UNKNOWN.match(what):
        name = unknown["name"]
        near = _nearest(name, steps, root, settings)
        hint = f"did you mean {near}?" if near else "docs/job.md lists every setting"
        return f"{_path([*steps, name])}: unknown setting: {hint}"
    if missing := _MISSING.match(what):
        return f"{_path([*steps, missing['name']])}: is missing; batchrun new FILE writes a complete job file"
    value = _value_at(tables, steps)
    choices = [
        f'"{choice}"' for node in _types_at(root, steps) if isinstance(node, LiteralType) for choice in node.values
    ]
    if choices and isinstance(value, str):
        what = f"expected {' or '.join(choices)}"
    if isinstance(value, str | int | float):
        what = what.partition(", got ")[0].replace("Invalid decimal string", "Expected an amount in USD")
    # msgspec's "`int | null`" is "an integer": TOML has no null
    for types in reversed(list(_TYPES.finditer(what))):
        names = [name for name in (types["expected"] or types["got"]).split(" | ") if name != "null"]
        words = " or ".join(_PLAIN.get(name, f"`{name}`") for name in names) or "nothing"
        what = what[: types.start()] + words + what[types.end() :]
    what = what.replace(" of length >= 1", ", and not empty")
    shown = f" (is {value!r})" if isinstance(value, str | int | float) else ""
    return f"{_path(steps) or 'job'}: {what[0].lower()}{what[1:]}{shown}"


def _path(steps: Sequence[Step]) -> str:
    """The steps as a path: `request.messages[0].role`."""
    path = ""
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")


def _steps(message: str, at: str, tables: Mapping[str, Any], root: type) -> list[Step]:
    """msgspec's path as steps. msgspec does not name the keys of dicts; trying each key finds them."""
    steps: list[Step] = []
    for match in _STEP.finditer(at):
        if match["index"] != _ANY_KEY:
            steps.append(int(match["index"]) if match["index"] else match["name"])
            continue
        entries, invalid = _value_at(tables, steps), _ANY_KEY
        for key, value in entries.items() if isinstance(entries, Mapping) else ():
            try:
                msgspec.convert(_with(tables, steps, {key: value}), root)
            except msgspec.ValidationError as error:
                if str(error) == message:  # it is wrong as the only key
                    invalid = str(key)
                    break
        steps.append(invalid)
    return steps


def _with(tables: Mapping[str, Any], steps: Sequence[Step], value: object) -> Any:
    """The tables with another value at `steps`, all of which are names."""
    if not steps:
        return value
    first = str(steps[0])
    return {**tables, first: _with(tables[first], steps[1:], value)}


def _value_at(tables: object, steps: Sequence[Step]) -> object:
    value: Any = tables
    for step in steps:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
        else:
            return None
    return value


def _types_at(root: type, steps: Sequence[Step]) -> list[Type]:
    """The types that are allowed at `steps`; a union counts as its alternatives."""
    nodes: list[Type] = [type_info(root)]
    for step in steps:
        below = [each for node in nodes for each in _below(node, step)]
        nodes = [each for node in below for each in (node.types if isinstance(node, UnionType) else (node,))]
    return nodes


def _below(node: Type, step: Step) -> Iterator[Type]:
    match node:
        case StructType():
            yield from (field.type for field in node.fields if field.encode_name == step)
        case DictType():
            yield node.value_type
        case ListType():
            yield node.item_type


def _nearest(name: str, steps: list[Step], root: type, settings: Collection[str]) -> str | None:
    """The setting that an unknown name probably means.

    The same name in another table, else a similar name in this table, else a similar name anywhere.
    """
    name = _ABBREVIATED.get(name, name)
    siblings = [
        field.encode_name for node in _types_at(root, steps) if isinstance(node, StructType) for field in node.fields
    ]
    if name in siblings:  # an abbreviation
        return _path([*steps, name])
    for setting in settings:
        if setting.rpartition(".")[2] == name:
            return setting
    if near := difflib.get_close_matches(name, siblings, n=1):
        return _path([*steps, near[0]])
    return next(iter(difflib.get_close_matches(_path([*steps, name]), settings, n=1)), None)
