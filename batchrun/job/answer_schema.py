"""What a request expects of its answer, and what an answer lacks of it. PURE.

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


class Offered(msgspec.Struct, frozen=True):
    """What an answer may call: `functions`, whether the request offers them as such or as tools, each with the check of
    its arguments (None: any JSON), of which `bare` have no parameters, and tools that take any `texts`. `others`: there
    are tools of another kind too, whose names are not known, so a call of any name may be one of theirs.
    """

    functions: Mapping[str, Check | None] = {}
    bare: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    others: bool = False


class Expected:
    """What the answer to a request must be. One is shared by all requests that expect the same.

    `in_json`: the content is to be JSON. `schema` is what it is to fit, if anything; `offered` is what may be called.
    None: the request offers nothing, so nothing is said of calls.
    """

    def __init__(
        self,
        *,
        in_json: bool = False,
        schema: Schema | None = None,
        offered: Offered | None = None,
    ) -> None:
        """Raises: JobError: the schema is none."""
        self.in_json = in_json
        self.schema = schema
        self._check = None if schema is None else check_of(schema)
        self._offered = offered

    def content_flaw(self, content: str) -> Flaw | None:
        """What the content lacks; None where it is as asked."""
        return _flaw(content, self._check, "the answer") if self.in_json else None

    def call_flaw(self, name: str | None, arguments: str | None) -> Flaw | None:
        """What the call of a function lacks; None where it is one that was offered, with arguments that fit."""
        if (offered := self._offered) is None:
            return None
        if name is None or name not in offered.functions:
            return None if offered.others else _unknown(name)
        check = offered.functions[name]
        if name in offered.bare and not (arguments or "").strip():
            return None  # it needs no `{}`
        return _flaw(arguments or "", check, f"the text of the arguments of {name}")

    def tool_flaw(self, calls: str) -> Flaw | None:
        """What the first call that is not as asked lacks; `calls` of tools, as JSON text."""
        if self._offered is None:
            return None
        try:
            called = msgspec.json.decode(calls)
        except RecursionError:
            return Flaw("invalid_json", "the calls are nested too deep")
        return next(filter(None, map(self._flaw_of_tool, called)), None)

    def _flaw_of_tool(self, call: Any) -> Flaw | None:
        assert self._offered is not None
        if (custom := _named(call, "custom")) is not None and custom["name"] in self._offered.texts:
            return None
        called = _named(call, "function") or custom or {}
        arguments = called.get("arguments")
        if not isinstance(arguments, str | None):  # some servers send the object itself (practice)
            arguments = msgspec.json.encode(arguments).decode()
        return self.call_flaw(called.get("name"), arguments)


def of(response_format: Any, functions: Any, tools: Any = None) -> Expected:
    """What a request with these fields, as the wire has them, expects.

    Raises:
        JobError: a schema among them is none; the message names its field.
    """
    wanted = response_format if isinstance(response_format, dict) else {}
    named = wanted.get("json_schema") if wanted.get("type") == "json_schema" else None
    schema = named.get("schema") if isinstance(named, dict) else None
    try:
        return Expected(
            in_json=wanted.get("type") in ("json_object", "json_schema"),
            schema=schema if isinstance(schema, dict) else None,
            offered=_offered(functions, tools),
        )
    except JobError as error:
        raise JobError(f"response_format.json_schema.schema: {error}" if schema else str(error)) from error


def _offered(functions: Any, tools: Any) -> Offered | None:
    """What a request with these fields offers; None where it has neither. Tools are the server's matter: whatever has
    another form than those of functions and of custom tools is taken for a kind that only the server knows.
    """
    if not isinstance(functions, list) and not isinstance(tools, list):
        return None
    described = {f"functions[{place}]": function for place, function in enumerate(functions or ())}
    texts, others = set(), False
    for place, tool in enumerate(tools if isinstance(tools, list) else ()):
        if (function := _named(tool, "function")) is not None:
            described[f"tools[{place}].function"] = function
        elif (custom := _named(tool, "custom")) is not None:
            texts.add(custom["name"])
        else:
            others = True
    checks = {function["name"]: _parameters_check(function, place) for place, function in described.items()}
    bare = frozenset(function["name"] for function in described.values() if _is_bare(function.get("parameters")))
    return Offered(checks, bare, frozenset(texts), others)


def _is_bare(parameters: Any) -> bool:
    """True for no parameters, and for an object without properties, which says the same."""
    return not parameters or parameters.get("properties") == {}


def _named(tool: Any, kind: str) -> dict[str, Any] | None:
    """The part of a tool, or of a call, that describes it as one of this kind, if it has one with a name."""
    part = tool.get(kind) if isinstance(tool, dict) else None
    return part if isinstance(part, dict) and isinstance(part.get("name"), str) else None


def tool_schemas(tools: Any) -> dict[str, Any]:
    """The `parameters` of those tools that are functions, by their place: `tools[0].function.parameters`."""
    functions = [_named(tool, "function") for tool in tools] if isinstance(tools, list) else []
    return {
        f"tools[{place}].function.parameters": function["parameters"]
        for place, function in enumerate(functions)
        if function is not None and function.get("parameters")
    }


def _parameters_check(function: Mapping[str, Any], place: str) -> Check | None:
    """The check of a function's arguments; None where it has no parameters.

    Raises:
        JobError: its parameters are no schema.
    """
    if not (parameters := function.get("parameters")):
        return None
    try:
        return check_of(parameters)
    except JobError as error:
        raise JobError(f"{place}.parameters: {error}") from error


def _unknown(name: object) -> Flaw:
    return Flaw("unknown_function", f"the answer calls {name!r:.100}, which the request does not offer")


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
