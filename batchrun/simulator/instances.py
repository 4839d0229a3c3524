"""Values that satisfy a JSON Schema, drawn from a random generator: the simulator's structured answers. PURE."""

import math
from collections.abc import Callable
from random import Random
from typing import Any

from batchrun.simulator.refusal import Refused
from batchrun.simulator.schemas import CompiledSchema, Schema, compiled
from batchrun.simulator.words import WORDS

_TRIES = 8  # draws at one place before it counts as impossible
_SHALLOW = 4  # below this depth optional things are left out, so that recursive schemas come to an end
_DEEPEST = 40  # far below Python's own limit on recursion, of which a level here takes several frames
_MOST_NODES = 5_000  # bounds the work a hostile or huge schema may cause
_LONGEST_TEXT = 100_000
_LARGEST = 2**53  # beyond it JSON numbers are not exact everywhere (RFC 8259, section 6)

_FORMATS: dict[str, Callable[[Random], str]] = {
    "date-time": lambda rng: f"{_date(rng)}T{_time(rng)}Z",
    "date": lambda rng: _date(rng),
    "time": lambda rng: f"{_time(rng)}Z",
    "duration": lambda rng: f"P{rng.randint(1, 30)}D",
    "email": lambda rng: f"{rng.choice(WORDS)}{rng.randint(1, 99)}@example.com",
    "hostname": lambda rng: f"{rng.choice(WORDS)}.example.com",
    "ipv4": lambda rng: f"192.0.2.{rng.randint(1, 254)}",
    "ipv6": lambda rng: f"2001:db8::{rng.randint(1, 65_535):x}",
    "uri": lambda rng: f"https://example.com/{rng.choice(WORDS)}",
    "uuid": lambda rng: "{:08x}-{:04x}-4{:03x}-8{:03x}-{:012x}".format(
        *(rng.getrandbits(bits) for bits in (32, 16, 12, 12, 48))
    ),
}


class _Impossible(Exception):
    """No value was found for this part of the schema."""


class _TooLarge(Exception):
    """The schema requires more than the simulator makes."""


def instance(schema: Schema, rng: Random, param: str) -> Any:
    """A value that satisfies `schema`, the same for the same state of `rng`.

    Raises:
        Refused: 400; the schema is invalid, or no value was found: nothing satisfies it, or only luck would.
    """
    whole = compiled(schema, param)
    try:
        return _Maker(whole, rng).make(schema, depth=0)
    except (_Impossible, _TooLarge, RecursionError) as error:
        message = f"The simulator found no value for this schema: {error}"
        raise Refused(400, message, code="unsupported_schema", param=param) from error


class _Maker:
    """Draws one answer, and counts its values."""

    def __init__(self, whole: CompiledSchema, rng: Random) -> None:
        self._whole = whole
        self._rng = rng
        self._nodes = 0

    def make(self, schema: Schema | bool, depth: int) -> Any:
        """A value for one place in the schema, validated."""
        flat = self._flatten(schema, _DEEPEST)
        for _ in range(_TRIES):
            self._nodes += 1
            if self._nodes > _MOST_NODES:
                raise _TooLarge("it needs too many values, or refers to itself without end")
            candidate = self._candidate(flat, depth)
            if self._whole.fits(candidate, schema):
                return candidate
        raise _Impossible("its rules leave no room, or too little")

    def _candidate(self, schema: Schema, depth: int) -> Any:
        if depth > _DEEPEST:
            raise _Impossible("it is nested too deeply")
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            fitting = [value for value in schema["enum"] if self._whole.fits(value, schema)]
            if not fitting:
                raise _Impossible("none of its enumerated values fits")
            return self._rng.choice(fitting)
        if beyond := _ONLY_BY_LUCK & schema.keys():
            raise _Impossible(f"the simulator can't draw for `{min(beyond)}`: leave it out to rehearse")
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._branch(schema, keyword, depth)
        return self._typed(self._type_of(schema, depth), schema, depth)

    def _branch(self, schema: Schema, keyword: str, depth: int) -> Any:
        """A value for one of the alternatives, joined with the rules beside them."""
        rest = {name: operand for name, operand in schema.items() if name != keyword}
        branches = self._rng.sample(schema[keyword], len(schema[keyword]))
        if depth >= _SHALLOW:
            branches.sort(key=_may_nest)
        for branch in branches:
            try:
                return self.make({"allOf": [rest, branch]} if rest else branch, depth + 1)
            except _Impossible:
                continue
        raise _Impossible(f"no alternative of {keyword} works out")

    def _type_of(self, schema: Schema, depth: int) -> str:
        declared = schema.get("type")
        if declared is None:
            return next((kind for kind, words in _IMPLIED.items() if words & schema.keys()), "string")
        if isinstance(declared, str):
            return declared
        if not declared:
            raise _Impossible("two rules require different types")
        flat: list[str] = [name for name in declared if name not in ("object", "array")]
        return self._rng.choice(flat if flat and depth >= _SHALLOW else list[str](declared))

    def _typed(self, kind: str, schema: Schema, depth: int) -> Any:
        match kind:
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return _text(schema, self._rng)
            case "integer" | "number":
                return _number(schema, self._rng, whole=kind == "integer")
            case "boolean":
                return self._rng.random() < 0.5
            case _:
                return None

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        others = schema.get("additionalProperties", True)
        most = schema.get("maxProperties", math.inf)
        least = schema.get("minProperties", 0)
        made: dict[str, Any] = {}
        keep = 1.0 if least else 0.0 if depth >= _SHALLOW else 0.8
        room = most - len(set(required))
        for name in [*properties, *(name for name in required if name not in properties)]:
            if name in required:
                made[name] = self.make(properties.get(name, others), depth + 1)
            elif room >= 1 and self._rng.random() < keep:
                room -= self._try_into(made, name, properties[name], depth)
        while len(made) < least and others is not False:
            made[f"extra_{len(made)}"] = self.make(others, depth + 1)
        return made

    def _try_into(self, made: dict[str, Any], name: str, schema: Schema, depth: int) -> bool:
        """Adds an optional property unless it is one that can't be."""
        try:
            made[name] = self.make(schema, depth + 1)
        except _Impossible:
            return False
        return True

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        prefix = schema.get("prefixItems", [])
        others = schema.get("items", True)
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", math.inf), max(least, len(prefix)) + 2)
        if others is False:
            most = min(most, len(prefix))
        length = least if depth >= _SHALLOW or most <= least else self._rng.randint(max(least, min(1, most)), most)
        made: list[Any] = []
        for index in range(length):
            child = prefix[index] if index < len(prefix) else others
            try:
                made.append(self._another(child, made if schema.get("uniqueItems") else [], depth))
            except _Impossible:
                break  # a shorter list may do; `make` validates it
        return made

    def _another(self, schema: Schema, taken: list[Any], depth: int) -> Any:
        for _ in range(_TRIES):
            item = self.make(schema, depth + 1)
            if item not in taken:
                return item
        raise _Impossible("too few different items")

    def _flatten(self, schema: Schema | bool, depth: int) -> Schema:
        """One schema without `$ref` and `allOf` at its top. It only guides the drawing: the validator decides."""
        if isinstance(schema, bool):
            if not schema:
                raise _Impossible("it is `false`")
            return {}
        parts: list[Schema | bool] = list(schema.get("allOf", []))
        if "$ref" in schema:
            parts.append(self._whole.target(schema["$ref"]))
        if parts and depth <= 0:
            raise _Impossible("it refers to itself without end")
        flat = {name: operand for name, operand in schema.items() if name not in ("$ref", "allOf")}
        for part in parts:
            flat = _join(flat, self._flatten(part, depth - 1))
        return flat


# Draws are validated, so a keyword that the drawing ignores is never answered wrongly. With these, a draw would fit
# only by luck: some rows would be answered and others refused.
_ONLY_BY_LUCK = frozenset(
    {"pattern", "propertyNames", "contains", "if", "dependentRequired", "dependentSchemas", "dependencies"}
)
# Where no type is declared, the keywords imply one: a schema with `properties` means an object.
_IMPLIED = {
    "object": {"properties", "required", "additionalProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_LARGER = frozenset({"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"})
_SMALLER = frozenset({"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"})


def _may_nest(schema: Schema | bool) -> bool:
    return isinstance(schema, dict) and (
        "$ref" in schema or "properties" in schema or schema.get("type") in ("object", "array")
    )


def _join(left: dict[str, Any], right: Schema) -> dict[str, Any]:
    joined = dict(left)
    for keyword, operand in right.items():
        joined[keyword] = _both(keyword, left[keyword], operand) if keyword in left else operand
    return joined


def _both(keyword: str, left: Any, right: Any) -> Any:
    """One operand for two rules, as nearly as one can stand for both."""
    if keyword in _LARGER:
        return max(left, right)
    if keyword in _SMALLER:
        return min(left, right)
    match keyword:
        case "required":
            return [*left, *(name for name in right if name not in left)]
        case "properties":
            both = {name: {"allOf": [left[name], right[name]]} for name in left if name in right}
            return {**left, **right, **both}
        case "type":
            return _both_types(left, right)
        case "enum":
            return [value for value in left if value in right] or left
        case _:
            return left


def _both_types(left: str | list[str], right: str | list[str]) -> list[str]:
    lefts, rights = ([names] if isinstance(names, str) else names for names in (left, right))
    both = [name for name in lefts if name in rights]
    if "integer" not in both and {"integer", "number"} <= {*lefts, *rights}:
        both.append("integer")
    return both


def _number(schema: Schema, rng: Random, *, whole: bool) -> float:
    lows = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    highs = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    low = max(lows) if lows else min(0, min(highs) - 100 if highs else 0)
    high = min(highs) if highs else low + 100
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    if low > high:
        raise _Impossible("a lower bound is above the upper one")
    step = schema.get("multipleOf", 1 if whole else None)
    if step is not None:
        return _multiple(low, high, step, rng, whole=whole)
    value = rng.uniform(low, high)
    rounded = round(value, 2)
    return rounded if low < rounded < high else value


def _multiple(low: float, high: float, step: float, rng: Random, *, whole: bool) -> float:
    if not math.isfinite(low / step) or not math.isfinite(high / step):
        raise _Impossible("multipleOf is too small")
    first, last = math.ceil(low / step), math.floor(high / step)
    if first > last:
        raise _Impossible("no multiple lies within the bounds")
    value = rng.randint(first, last) * step
    return int(value) if whole and value == int(value) else round(value, 10)


def _text(schema: Schema, rng: Random) -> str:
    form = _FORMATS.get(schema.get("format", ""))
    if form is not None:
        return form(rng)
    low = schema.get("minLength", 0)
    high = schema.get("maxLength", max(low, 24))
    if low > _LONGEST_TEXT:
        raise _TooLarge(f"a text of {low} characters")
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 3) + low // 3))[:high]
    return f"{text.rstrip()}{'.' * (len(text) - len(text.rstrip()))}"


def _date(rng: Random) -> str:
    return f"20{rng.randint(10, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}:{rng.randint(0, 59):02}"
