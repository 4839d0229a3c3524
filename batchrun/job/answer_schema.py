"""Validates answers against the JSON schema and the tools of their request. PURE.

Schemas are JSON Schema 2020-12, or the draft that their `$schema` names.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from batchrun.errors import JobError

MAX_MESSAGE_CHARS = 300
"""A message names the place and the rule that failed; the answer itself is in the column `content`."""

MAX_PLACE_CHARS = 100  # a path can be as deep as the answer, and must leave room for the rule that failed

Schema = Mapping[str, Any]

Check = Callable[[Any], str | None]
"""Returns what is wrong with a JSON value and where, or None for a valid value."""


class Flaw(msgspec.Struct, frozen=True):
    """Why an answer is invalid: `kind` and `message` of the column `error`."""

    kind: str
    message: str


KINDS = frozenset({"invalid_json", "schema", "unknown_function"})
"""The kinds of flaws. Another attempt may cure each of them."""


class Offered(msgspec.Struct, frozen=True):
    """The calls that an answer may make.

    `functions`: functions and function tools by name, each with the check of its arguments (None: any JSON).
    `bare`: those of them without parameters. `texts`: custom tools, which take any text.
    `others`: the request has tools of a kind that only the server knows, so a call of any name may be valid.
    """

    functions: Mapping[str, Check | None] = {}
    bare: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    others: bool = False


class Expected:
    """The form of a valid answer to a request. All requests with the same expectation share one object.

    `in_json`: the content must be JSON. `schema`: the schema that the content must match, if there is one.
    `offered`: what the answer may call; None for a request without functions or tools: anything, with JSON arguments.
    """

    def __init__(
        self,
        *,
        in_json: bool = False,
        schema: Schema | None = None,
        offered: Offered | None = None,
    ) -> None:
        """Raises: JobError: the schema is invalid."""
        self.in_json = in_json
        self.schema = schema
        self._check = None if schema is None else check_of(schema)
        self._offered = offered

    def content_flaw(self, content: str) -> Flaw | None:
        """Why the content is invalid, or None."""
        return _flaw(content, self._check, "the answer") if self.in_json else None

    def call_flaw(self, name: str | None, arguments: str | None) -> Flaw | None:
        """Why a function call is invalid, or None. The request must offer the function, and the arguments must fit."""
        if (offered := self._offered) is None:  # the server has tools of its own; arguments are JSON there as well
            return _flaw(arguments, None, "the arguments of a call") if arguments and arguments.strip() else None
        if name is None or name not in offered.functions:
            return (
                None
                if offered.others
                else Flaw("unknown_function", f"the answer calls {name!r:.100}, which the request does not offer")
            )
        check = offered.functions[name]
        if name in offered.bare and not (arguments or "").strip():
            return None  # a function without parameters may be called with no text at all
        return _flaw(arguments or "", check, f"the text of the arguments of {name}")

    def tool_flaw(self, calls: str) -> Flaw | None:
        """Why the first invalid tool call is invalid, or None; `calls` is the list of tool calls as JSON text."""
        texts = self._offered.texts if self._offered is not None else frozenset()
        try:
            called = msgspec.json.decode(calls)
        except RecursionError:
            return Flaw("invalid_json", "the calls are nested too deep")
        for call in called:
            if (custom := _named(call, "custom")) is not None and custom["name"] in texts:
                continue
            function = _named(call, "function") or custom or {}
            arguments = function.get("arguments")
            if not isinstance(arguments, str | None):  # some servers send the object itself (practice)
                arguments = msgspec.json.encode(arguments).decode()
            if (flaw := self.call_flaw(function.get("name"), arguments)) is not None:
                return flaw
        return None


def of(response_format: Any, functions: Any, tools: Any = None) -> Expected:
    """The expectation of a request with these fields of its body.

    Raises:
        JobError: one of the schemas is invalid; the message names its field.
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
    """The tools of a request with these fields; None for a request with neither.

    A tool that is neither a function nor a custom tool counts as a kind that only the server knows.
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
    checks: dict[str, Check | None] = {}
    bare = set()
    for place_of, function in described.items():
        parameters = function.get("parameters")
        try:
            checks[function["name"]] = check_of(parameters) if parameters else None
        except JobError as error:
            raise JobError(f"{place_of}.parameters: {error}") from error
        if not parameters or parameters.get("properties") == {}:
            bare.add(function["name"])
    return Offered(checks, frozenset(bare), frozenset(texts), others)


def _named(tool: Any, kind: str) -> dict[str, Any] | None:
    """`tool[kind]` of a tool or a tool call, if it is an object with a name; else None."""
    part = tool.get(kind) if isinstance(tool, dict) else None
    return part if isinstance(part, dict) and isinstance(part.get("name"), str) else None


def tool_schemas(tools: Any) -> dict[str, Any]:
    """The `parameters` of the function tools by their path, such as `tools[0].function.parameters`."""
    functions = [_named(tool, "function") for tool in tools] if isinstance(tools, list) else []
    return {
        f"tools[{place}].function.parameters": function["parameters"]
        for place, function in enumerate(functions)
        if function is not None and function.get("parameters")
    }


def check_of(schema: Schema) -> Check:
    """A check of values against the schema. 0.3 µs for a value of two fields (measured).

    Raises:
        JobError: the schema is invalid, or refers to something outside it; the message says where in the schema.
    """
    import jsonschema_rs  # 55 ms: only for a job that has a schema

    try:
        # offline: references are resolved within the schema, and nothing is ever fetched or opened;
        # `format` is an annotation by the standard, not a rule
        validator = jsonschema_rs.validator_for(dict(schema), offline=True, validate_formats=False)
    except (ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "message", str(error))
        raise JobError(f"invalid JSON schema: {_bounded(_at(getattr(error, 'instance_path', ())), reason)}") from error

    def check(value: Any) -> str | None:
        try:
            validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return _bounded(_at(error.instance_path), error.message)
        except (ValueError, RecursionError) as error:
            # half a surrogate pair, or nesting deeper than the validator goes
            return _bounded("", str(error))
        return None

    return check


def schema_of(wanted: Any) -> dict[str, Any]:
    """The JSON schema of `wanted`: a schema as a dict, a Pydantic model class, or a type that msgspec knows (its own
    structs, dataclasses, TypedDicts).

    Raises:
        JobError: it has no JSON schema, or an invalid one.
    """
    if isinstance(wanted, Mapping):
        schema = dict(wanted)
    elif callable(method := getattr(wanted, "model_json_schema", None)):  # Pydantic, without importing it
        schema = method()
    else:
        try:
            schema = msgspec.json.schema(wanted)
        except (TypeError, RecursionError) as error:
            raise JobError(f"response_format: {wanted!r:.100} has no JSON schema: {error}") from error
    if (reason := problem(schema)) is not None:
        raise JobError(f"response_format: {reason}")
    definitions = schema.get("$defs")
    if not isinstance(definitions, dict) or set(schema) != {"$ref", "$defs"}:
        return schema
    # servers want an object at the top, not a `$ref` to a definition
    named = next((one for name, one in definitions.items() if schema["$ref"] == f"#/$defs/{name}"), None)
    return {**named, "$defs": definitions} if isinstance(named, dict) else schema


def problem(schema: Schema) -> str | None:
    """Why the schema is invalid, or None."""
    try:
        check_of(schema)
    except JobError as error:
        return str(error)
    return None


def _flaw(text: str, check: Check | None, what: str) -> Flaw | None:
    """Why JSON text is invalid, or None. Nothing is repaired: white space around it is allowed, a code fence is not."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        return Flaw("invalid_json", _bounded("", f"{what} is not valid JSON: {error}"))
    reason = None if check is None else check(value)
    return None if reason is None else Flaw("schema", _bounded("", f"{what} does not match its schema: {reason}"))


def _at(path: Sequence[str | int]) -> str:
    """A place in a value as the start of a message: `at $.items[0].name: `."""
    if not path:
        return ""
    steps = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return f"at ${steps}"[:MAX_PLACE_CHARS] + ": "


def _bounded(place: str, message: str) -> str:
    return f"{place}{' '.join(message.split())}"[:MAX_MESSAGE_CHARS]


ANYTHING = Expected()
"""Accepts any answer."""
