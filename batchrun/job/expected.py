"""What a request expects of its answer, and what an answer lacks of it. PURE; sole importer of jsonschema_rs.

Schemas are JSON Schema 2020-12, or the draft that their `$schema` names. References lead to places within the schema:
nothing is ever fetched or opened. `format` is an annotation and is not judged, as the standard has it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from batchrun.errors import JobError

MAX_MESSAGE_CHARS = 300
"""A flaw is told by its place and its rule; the answer itself is in the row's content."""

MAX_PLACE_CHARS = 100

Schema = Mapping[str, Any]

Check = Callable[[Any], str | None]
"""What is wrong with a JSON value, with its place; None where nothing is."""


class Flaw(msgspec.Struct, frozen=True):
    """What an answer lacks: `kind` and `message` of the column `error`."""

    kind: str
    message: str


KINDS = frozenset({"invalid_json", "schema", "unknown_function"})
"""The kinds of flaws: those of an answer that another one may not have."""


class Expected:
    """What the answer to a request must be. One is shared by all requests that expect the same.

    `in_json`: the content is to be JSON. `schema` is what it is to fit, if anything; `functions` are those that may be
    called, each with the check of its arguments. None: none were offered, so nothing is said of them.
    """

    def __init__(
        self,
        *,
        in_json: bool = False,
        schema: Schema | None = None,
        functions: Mapping[str, Check | None] | None = None,
    ) -> None:
        """Raises: JobError: the schema is none."""
        self.in_json = in_json
        self.schema = schema
        self._check = None if schema is None else check_of(schema)
        self._functions = functions

    def content_flaw(self, content: str) -> Flaw | None:
        """What the content lacks; None where it is as asked."""
        return _flaw(content, self._check, "the answer") if self.in_json else None

    def call_flaw(self, name: str | None, arguments: str | None) -> Flaw | None:
        """What the call of a function lacks; None where it is one that was offered, with arguments that fit."""
        if self._functions is None:
            return None
        if name is None or name not in self._functions:
            return Flaw("unknown_function", f"the answer calls {name!r:.100}, which is not among the functions")
        check = self._functions[name]
        if check is None and not (arguments or "").strip():
            return None  # a function without parameters needs no `{}`
        return _flaw(arguments or "", check or _no_check, f"the arguments of {name}")


def of(response_format: Any, functions: Any) -> Expected:
    """What a request with these fields, as the wire has them, expects.

    Raises:
        JobError: a schema among them is none; the message names its field.
    """
    wanted = response_format if isinstance(response_format, dict) else {}
    named = wanted.get("json_schema") if wanted.get("type") == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    offered = functions if isinstance(functions, list) else None
    try:
        return Expected(
            in_json=wanted.get("type") in ("json_object", "json_schema"),
            schema=schema if isinstance(schema, dict) else None,
            functions=None if offered is None else _checks(offered),
        )
    except JobError as error:
        raise JobError(f"response_format.json_schema.schema: {error}" if schema else str(error)) from error


def _checks(functions: Sequence[Any]) -> dict[str, Check | None]:
    checks: dict[str, Check | None] = {}
    for place, function in enumerate(functions):
        parameters = function.get("parameters")
        try:
            checks[function["name"]] = check_of(parameters) if parameters else None
        except JobError as error:
            raise JobError(f"functions[{place}].parameters: {error}") from error
    return checks


def check_of(schema: Schema) -> Check:
    """The check of values against the schema. 0.3 µs for a value of two fields (measured).

    Raises:
        JobError: it is no JSON schema, or refers to something outside; the message says where, without the field.
    """
    import jsonschema_rs  # 55 ms: only for a job that has a schema

    try:
        validator = jsonschema_rs.validator_for(dict(schema), offline=True, validate_formats=False)
    except (ValueError, TypeError, RecursionError) as error:
        told = getattr(error, "message", str(error))
        raise JobError(f"no JSON schema: {_bounded(_at(getattr(error, 'instance_path', ())), told)}") from error

    def check(value: Any) -> str | None:
        try:
            validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return _bounded(_at(error.instance_path), error.message)
        except (ValueError, RecursionError) as error:  # of half a character, or nesting beyond what it walks
            return _bounded("", str(error))
        return None

    return check


def schema_of(wanted: Any) -> dict[str, Any]:
    """The JSON schema of `wanted`: itself, that of a Pydantic model class, or of a type that msgspec knows (its own
    structs, dataclasses, TypedDicts). A type that is a reference to its own definition is given as that.

    Raises:
        JobError: it has no JSON schema, or no valid one.
    """
    if isinstance(wanted, Mapping):
        schema = dict(wanted)
    elif callable(told := getattr(wanted, "model_json_schema", None)):  # Pydantic, without importing it
        schema = told()
    else:
        try:
            schema = msgspec.json.schema(wanted)
        except (TypeError, RecursionError) as error:
            raise JobError(f"response_format: {wanted!r:.100} has no JSON schema: {error}") from error
    if (said := problem(schema)) is not None:
        raise JobError(f"response_format: {said}")
    return _opened(schema)


def _opened(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definition in place of a mere reference to it: servers want an object at the top."""
    definitions, reference = schema.get("$defs"), schema.get("$ref")
    if not isinstance(definitions, dict) or set(schema) != {"$ref", "$defs"}:
        return schema
    named = next((one for name, one in definitions.items() if reference == f"#/$defs/{name}"), None)
    return {**named, "$defs": definitions} if isinstance(named, dict) else schema


def problem(schema: Schema) -> str | None:
    """Why this is no schema to check by; None where it is one."""
    try:
        check_of(schema)
    except JobError as error:
        return str(error)
    return None


def _no_check(value: Any) -> None:
    return None


def _flaw(text: str, check: Check | None, what: str) -> Flaw | None:
    """What JSON text lacks. Nothing is repaired: white space around it is JSON's own, a fence is none."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return Flaw("invalid_json", _bounded("", f"{what} is no JSON: {error}"))
    told = None if check is None else check(value)
    return None if told is None else Flaw("schema", _bounded("", f"{what} does not fit its schema: {told}"))


def _at(path: Sequence[str | int]) -> str:
    """A place in a value: `$.items[0].name`."""
    if not path:
        return ""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"at ${steps}"[:MAX_PLACE_CHARS] + ": "


def _bounded(place: str, message: str) -> str:
    return f"{place}{' '.join(message.split())}"[:MAX_MESSAGE_CHARS]


ANYTHING = Expected()
"""Whatever comes is fine."""
