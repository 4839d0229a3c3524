"""Values that satisfy a JSON Schema, drawn from a random generator: the simulator's structured answers. PURE."""

import math
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from random import Random
from typing import Any

from batchrun.simulator.refusal import Refused
from batchrun.simulator.schemas import CompiledSchema, Schema, compiled

_TRIES = 8  # draws at one place before it counts as impossible
_SHALLOW = 4  # below this depth optional things are left out, so that recursive schemas end
_DEEPEST = 40  # far below Python's own limit on recursion, of which a level here takes several frames
_MOST_NODES = 5_000  # bounds the work a hostile or huge schema may cause
_LONGEST_TEXT = 100_000  # characters; bounds the same
_LARGEST = 2**53  # beyond it JSON numbers are not exact everywhere (RFC 8259, section 6)

_TEXT = (
    "answer battery because before better bright built button camera careful charge clean clear color common compare"
    " cover damage deliver design detail device early easy engine every exact expect fabric family fast feature few"
    " final fine fresh garden gentle good great handle happy heavy house idea image item kitchen large later leather"
    " letter light little long market material matter metal minor model modern money morning narrow natural never new"
    " nothing number office often order other owner paper part pattern perfect picture plain plastic point polite"
    " price product promise quality question quick quiet reason result return review river round safe screen second"
    " service shape short simple small smooth soft solid sound special steel still strong sturdy summer surface table"
    " three time tool travel trust useful value warm water weight white window winter wonderful wood work year"
)
WORDS = tuple(_TEXT.split())  # the vocabulary of all answers

_FORMATS: dict[str, Callable[[Random], str]] = {
    "date-time": lambda rng: f"{_moment(rng):%Y-%m-%dT%H:%M:%SZ}",
    "date": lambda rng: f"{_moment(rng):%Y-%m-%d}",
    "time": lambda rng: f"{_moment(rng):%H:%M:%SZ}",
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
        match self._type_of(schema, depth):
            case "object":
                return self._object(schema, depth)
            case "array":
                return self._array(schema, depth)
            case "string":
                return _text(schema, self._rng)
            case "integer" | "number" as kind:
                return _number(schema, self._rng, whole=kind == "integer")
            case "boolean":
                return self._rng.random() < 0.5
            case _:
                return None

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
                with suppress(_Impossible):  # it is optional, so an answer does without it
                    made[name] = self.make(properties[name], depth + 1)
                    room -= 1
        while len(made) < least and others is not False:
            made[f"extra_{len(made)}"] = self.make(others, depth + 1)
        return made

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
                drawn = (self.make(child, depth + 1) for _ in range(_TRIES))
                made.append(next(item for item in drawn if item not in made or not schema.get("uniqueItems")))
            except (_Impossible, StopIteration):
                break  # a shorter list may do; `make` validates it
        return made

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


def _join(left: Schema, right: Schema) -> dict[str, Any]:
    """Both schemas' rules, as far as one rule can express two of a kind."""
    joined = dict(left)
    for keyword, operand in right.items():
        if keyword not in left:
            joined[keyword] = operand
            continue
        other = left[keyword]
        if keyword in _LARGER:
            joined[keyword] = max(other, operand)
        elif keyword in _SMALLER:
            joined[keyword] = min(other, operand)
        elif keyword == "required":
            joined[keyword] = [*other, *(name for name in operand if name not in other)]
        elif keyword == "properties":
            both = {name: {"allOf": [other[name], operand[name]]} for name in other if name in operand}
            joined[keyword] = {**other, **operand, **both}
        elif keyword == "enum":
            joined[keyword] = [value for value in other if value in operand] or other
        elif keyword == "type":
            lefts, rights = ([names] if isinstance(names, str) else names for names in (other, operand))
            kinds = [name for name in lefts if name in rights]
            if "integer" not in kinds and {"integer", "number"} <= {*lefts, *rights}:
                kinds.append("integer")  # every integer is a number
            joined[keyword] = kinds
    return joined


def _number(schema: Schema, rng: Random, *, whole: bool) -> float:
    lows = [schema[name] for name in ("minimum", "exclusiveMinimum") if name in schema]
    highs = [schema[name] for name in ("maximum", "exclusiveMaximum") if name in schema]
    low = max(lows) if lows else min(0, min(highs) - 100 if highs else 0)
    high = min(highs) if highs else low + 100
    low, high = max(low, -_LARGEST), min(high, _LARGEST)
    if low > high:
        raise _Impossible("a lower bound is above the upper one")
    step = schema.get("multipleOf", 1 if whole else None)
    if step is None:
        value = rng.uniform(low, high)
        rounded = round(value, 2)
        return rounded if low < rounded < high else value

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


def _moment(rng: Random) -> datetime:
    return datetime(2010, 1, 1) + timedelta(seconds=rng.randrange(20 * 365 * 86_400))
