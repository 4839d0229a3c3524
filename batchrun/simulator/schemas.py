"""JSON Schema as far as the simulator speaks it: is this a schema, and does this value satisfy it. Pure.

The vocabulary is JSON Schema 2020-12 (json-schema.org/draft/2020-12) without what `UNSUPPORTED` names. Those are
refused rather than ignored: an answer that only seems to fit the schema would be worse than none.
"""

from collections.abc import Callable, Mapping, Sized
from math import isfinite
from typing import Any
from urllib.parse import unquote

from batchrun.simulator.refusal import Refused

Schema = Mapping[str, Any]

UNSUPPORTED = frozenset(
    {"pattern", "patternProperties", "propertyNames", "not", "if", "then", "else", "contains", "minContains"}
    | {"maxContains", "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedItems"}
    | {"unevaluatedProperties", "additionalItems", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef"}
)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    return is_number(value) and value == int(value)  # type: ignore[call-overload]  # is_number


TYPES: dict[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": is_number,
    "integer": is_integer,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_type(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# What each keyword's own value must be; those that hold schemas are below.
_OPERANDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "type": (_is_type, "a JSON type or a list of them"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list of at least one value"),
    "required": (_are_names, "a list of names"),
    "format": (TYPES["string"], "a string"),
    "description": (TYPES["string"], "a string"),
    "uniqueItems": (TYPES["boolean"], "a boolean"),
    "multipleOf": (lambda value: is_number(value) and value > 0, "a number above 0"),  # type: ignore[operator]
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), (is_number, "a number")),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), (_is_count, "a count from 0")),
    **dict.fromkeys(("minProperties", "maxProperties"), (_is_count, "a count from 0")),
}
_ONE_SCHEMA = frozenset({"items", "additionalProperties"})
_SCHEMA_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems"})
_SCHEMA_MAPS = frozenset({"properties", "$defs", "definitions"})


def check_schema(schema: Schema, param: str) -> None:
    """`schema` is a JSON Schema that the simulator can answer.

    Raises:
        Refused: 400; `param` and the path inside the schema say where it is not.
    """
    _check(schema, schema, param)


def _check(schema: object, root: Schema, path: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _invalid(path, "is neither an object nor a boolean")
    for keyword, operand in schema.items():
        where = f"{path}.{keyword}"
        if keyword in UNSUPPORTED or (keyword == "$id" and schema is not root):
            message = f"The simulator does not know `{keyword}` of JSON Schema: leave it out to rehearse"
            raise Refused(400, message, code="unsupported_schema", param=where)
        if keyword == "$ref":
            resolve(operand, root, where)
        elif keyword in _OPERANDS:
            is_valid, wanted = _OPERANDS[keyword]
            if not is_valid(operand):
                raise _invalid(where, f"is not {wanted}")
        else:
            _check_children(keyword, operand, root, where)


def _check_children(keyword: str, operand: object, root: Schema, path: str) -> None:
    if keyword in _ONE_SCHEMA:
        _check(operand, root, path)
    elif keyword in _SCHEMA_LISTS:
        if not isinstance(operand, list) or not operand:
            raise _invalid(path, "is not a list of schemas")
        for index, child in enumerate(operand):
            _check(child, root, f"{path}[{index}]")
    elif keyword in _SCHEMA_MAPS:
        if not isinstance(operand, dict):
            raise _invalid(path, "is not an object of schemas")
        for name, child in operand.items():
            _check(child, root, f"{path}.{name}")


def _invalid(path: str, complaint: str) -> Refused:
    return Refused(400, f"Invalid schema: {path} {complaint}", code="invalid_schema", param=path)


def resolve(reference: object, root: Schema, path: str = "$ref") -> Schema | bool:
    """The schema that a `#` reference points to (JSON Pointer, RFC 6901, in a URI fragment).

    Raises:
        Refused: 400; it points nowhere, or out of this schema.
    """
    found: object = root
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise _invalid(path, "is not a reference within the schema, such as #/$defs/name")
    for step in reference.split("/")[1:]:
        name = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            raise _invalid(path, f"points to {reference}, which is not there")
    if not isinstance(found, dict | bool):
        raise _invalid(path, f"points to {reference}, which is no schema")
    return found


def equal(left: object, right: object) -> bool:
    """Equality of JSON values: 1 is 1.0 but not true, at any depth."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    return left == right


def matches(value: object, schema: Schema | bool, root: Schema) -> bool:
    """Whether a JSON value satisfies a schema that `check_schema` passed; `format` is not judged."""
    if isinstance(schema, bool):
        return schema
    return all(
        _KEYWORDS[keyword](value, operand, schema, root) for keyword, operand in schema.items() if keyword in _KEYWORDS
    )


_Judge = Callable[[Any, Any, Schema, Schema], bool]


def _type(value: object, names: str | list[str], _schema: Schema, _root: Schema) -> bool:
    return any(TYPES[name](value) for name in (names if isinstance(names, list) else [names]))


def _properties(value: object, children: Schema, _schema: Schema, root: Schema) -> bool:
    if not isinstance(value, dict):
        return True
    return all(matches(value[name], child, root) for name, child in children.items() if name in value)


def _additional(value: object, child: Schema | bool, schema: Schema, root: Schema) -> bool:
    if not isinstance(value, dict):
        return True
    extra = value.keys() - schema.get("properties", {}).keys()
    return all(matches(value[name], child, root) for name in extra)


def _items(value: object, child: Schema | bool, schema: Schema, root: Schema) -> bool:
    first = len(schema.get("prefixItems", ()))
    return not isinstance(value, list) or all(matches(item, child, root) for item in value[first:])


def _prefix(value: object, children: list[Schema], _schema: Schema, root: Schema) -> bool:
    if not isinstance(value, list):
        return True
    return all(matches(item, child, root) for item, child in zip(value, children, strict=False))


def _one_of(value: object, children: list[Schema], _schema: Schema, root: Schema) -> bool:
    return sum(matches(value, child, root) for child in children) == 1


def _is_multiple(value: float, step: float) -> bool:
    """By division: `0.3 % 0.1` is not 0 in binary, and 0.3 / 0.1 is what validators judge by."""
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    quotient = value / step
    return isfinite(quotient) and quotient == int(quotient)


def _bound(judge: Callable[[Any, Any], bool]) -> _Judge:
    return lambda value, operand, _schema, _root: not is_number(value) or judge(value, operand)


def _size(of: type[Sized], judge: Callable[[int, int], bool]) -> _Judge:
    return lambda value, operand, _schema, _root: not isinstance(value, of) or judge(len(value), operand)


def _are_unique(items: list[object]) -> bool:
    return not any(equal(item, other) for index, item in enumerate(items) for other in items[:index])


_KEYWORDS: dict[str, _Judge] = {
    "type": _type,
    "enum": lambda value, allowed, _schema, _root: any(equal(value, one) for one in allowed),
    "const": lambda value, operand, _schema, _root: equal(value, operand),
    "minimum": _bound(lambda value, low: value >= low),
    "maximum": _bound(lambda value, high: value <= high),
    "exclusiveMinimum": _bound(lambda value, low: value > low),
    "exclusiveMaximum": _bound(lambda value, high: value < high),
    "multipleOf": _bound(_is_multiple),
    "minLength": _size(str, lambda length, low: length >= low),
    "maxLength": _size(str, lambda length, high: length <= high),
    "minItems": _size(list, lambda length, low: length >= low),
    "maxItems": _size(list, lambda length, high: length <= high),
    "minProperties": _size(dict, lambda length, low: length >= low),
    "maxProperties": _size(dict, lambda length, high: length <= high),
    "uniqueItems": lambda value, on, _schema, _root: not on or not isinstance(value, list) or _are_unique(value),
    "required": lambda value, names, _schema, _root: not isinstance(value, dict) or value.keys() >= set(names),
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "prefixItems": _prefix,
    "allOf": lambda value, children, _schema, root: all(matches(value, child, root) for child in children),
    "anyOf": lambda value, children, _schema, root: any(matches(value, child, root) for child in children),
    "oneOf": _one_of,
    "$ref": lambda value, reference, _schema, root: matches(value, resolve(reference, root), root),
}
