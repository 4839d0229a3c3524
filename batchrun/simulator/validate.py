"""The request as docs/api.md describes it: every field by type and range, and no other field.

The types below are the validation: msgspec reads them and names the wrong field. `null` is not a value of any field,
and a boolean is not a number.
"""

import binascii
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from batchrun.simulator.ledger import question_of
from batchrun.simulator.refusal import Refused
from batchrun.simulator.schemas import compiled

MAX_OUTPUT_TOKENS = 128_000  # docs/api.md, "Transport": maximum output
CONTEXT_TOKENS = 400_000  # the same: context window

_Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_OutputTokens = Annotated[int, Meta(ge=1, le=MAX_OUTPUT_TOKENS)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class _Strict(Struct, frozen=True, forbid_unknown_fields=True):
    """An object of a request, which has no other fields than these."""


class ImageURL(_Strict, frozen=True):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict, frozen=True, tag_field="type", tag="text"):
    text: str


class ImagePart(_Strict, frozen=True, tag_field="type", tag="image_url"):
    image_url: ImageURL


class RefusalPart(_Strict, frozen=True, tag_field="type", tag="refusal"):
    refusal: str


class CalledFunction(_Strict, frozen=True):
    name: str
    arguments: str


class ToolCall(_Strict, frozen=True):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(_Strict, frozen=True):
    """One message. The fields of some roles are practice: clients send an assistant's message back as it came."""

    role: Literal["user", "assistant", "system", "developer", "tool", "function"]
    content: str | Annotated[tuple[TextPart | ImagePart | RefusalPart, ...], Meta(min_length=1)] | UnsetType | None = (
        UNSET
    )
    name: str | UnsetType = UNSET
    tool_calls: tuple[ToolCall, ...] | UnsetType | None = UNSET
    function_call: CalledFunction | UnsetType | None = UNSET
    tool_call_id: str | UnsetType = UNSET
    refusal: str | UnsetType | None = UNSET
    annotations: tuple[Any, ...] | UnsetType | None = UNSET
    audio: UnsetType | None = UNSET

    def calls(self) -> tuple[CalledFunction, ...]:
        """The calls that an assistant's message makes."""
        tools = tuple(call.function for call in self.tool_calls) if isinstance(self.tool_calls, tuple) else ()
        return (*tools, self.function_call) if isinstance(self.function_call, CalledFunction) else tools


class Function(_Strict, frozen=True):
    name: _Name
    description: str | UnsetType = UNSET
    parameters: dict[str, Any] | UnsetType = UNSET
    strict: bool | UnsetType = UNSET  # practice


class NamedFunction(_Strict, frozen=True):
    name: str


class Tool(_Strict, frozen=True):
    type: Literal["function"]
    function: Function


class NamedTool(_Strict, frozen=True):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(_Strict, frozen=True, tag_field="type", tag="text"):
    pass


class JSONObjectFormat(_Strict, frozen=True, tag_field="type", tag="json_object"):
    pass


class NamedSchema(_Strict, frozen=True):
    name: _Name
    schema: dict[str, Any]
    description: str | UnsetType = UNSET
    strict: bool | UnsetType = UNSET


class JSONSchemaFormat(_Strict, frozen=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class StreamOptions(_Strict, frozen=True):
    include_usage: bool = False


class ChatRequest(_Strict, frozen=True):
    """The body. Fields of the reference come first, then those of practice: validated, and otherwise ignored."""

    model: Annotated[str, Meta(min_length=1)]
    messages: Annotated[tuple[Message, ...], Meta(min_length=1)]
    reasoning_effort: Literal["low", "medium", "high", "xhigh"] | UnsetType = UNSET
    max_tokens: _OutputTokens | UnsetType = UNSET
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(ge=0, le=1)] = 1.0
    stream: bool = False
    functions: Annotated[tuple[Function, ...], Meta(min_length=1)] = ()
    function_call: Literal["none", "auto"] | NamedFunction = "auto"
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat = TextFormat()

    max_completion_tokens: _OutputTokens | UnsetType = UNSET
    n: Annotated[int, Meta(ge=1, le=128)] = 1
    stream_options: StreamOptions = StreamOptions()
    tools: Annotated[tuple[Tool, ...], Meta(min_length=1)] = ()
    tool_choice: Literal["none", "auto", "required"] | NamedTool | UnsetType = UNSET
    parallel_tool_calls: bool | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    stop: str | Annotated[tuple[str, ...], Meta(max_length=4)] | UnsetType = UNSET
    logprobs: bool | UnsetType = UNSET
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | UnsetType = UNSET
    logit_bias: dict[str, float] | UnsetType = UNSET
    presence_penalty: _Penalty | UnsetType = UNSET
    frequency_penalty: _Penalty | UnsetType = UNSET
    user: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    store: bool | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    verbosity: Literal["low", "medium", "high"] | UnsetType = UNSET
    safety_identifier: str | UnsetType = UNSET
    prompt_cache_key: str | UnsetType = UNSET

    @property
    def served_by(self) -> str | None:
        """The tier that the answer names: the one that the request names, where it names one."""
        if not isinstance(self.service_tier, str):
            return None
        return "default" if self.service_tier == "auto" else self.service_tier

    def output_limit(self) -> int:
        """The most tokens a choice may have: the smaller of the two fields that limit it, else the model's limit."""
        limits = (self.max_tokens, self.max_completion_tokens)
        return min((limit for limit in limits if isinstance(limit, int)), default=MAX_OUTPUT_TOKENS)


class Question(Struct, frozen=True):
    """A valid request, and its identity."""

    request: ChatRequest
    digest: bytes


def parse_body(body: bytes) -> dict[str, Any]:
    """The body's JSON object.

    Raises:
        Refused: 400, it is not a JSON object.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refused(400, "The body is not a JSON object", code="invalid_json")
    return value


def parse_question(body: dict[str, Any]) -> Question:
    """The request in a body, validated.

    Raises:
        Refused: 400 that names the first wrong field.
    """
    try:
        request = msgspec.convert(body, ChatRequest)
    except msgspec.ValidationError as error:
        raise _refusal(str(error)) from error
    _check_messages(request)
    _check_functions("functions", request.functions, request.function_call)
    _check_functions("tools", [tool.function for tool in request.tools], request.tool_choice)
    if request.tool_choice is not UNSET and not request.tools:
        raise _invalid("tool_choice", "it goes with tools")
    if isinstance(request.response_format, JSONSchemaFormat):
        schema = request.response_format.json_schema.schema
        compiled(schema, "response_format.json_schema.schema")
    return Question(request, question_of(body))


_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def _refusal(complaint: str) -> Refused:
    """The 400 for msgspec's `complaint - at `$.path``, with the field's path as `param`."""
    reason, _, where = complaint.rpartition(" - at `$")
    if not reason:
        reason, where = complaint, ""
    path = where.removesuffix("`").removeprefix(".")
    for pattern, code in ((_UNKNOWN, "unknown_parameter"), (_MISSING, "missing_required_parameter")):
        if found := pattern.match(reason):
            return Refused(400, reason, code=code, param=f"{path}.{found[1]}".removeprefix("."))
    return Refused(400, f"Invalid value for {path}: {reason}", code="invalid_value", param=path or None)


def _invalid(param: str, reason: str) -> Refused:
    return Refused(400, f"Invalid value for {param}: {reason}", code="invalid_value", param=param)


def _check_messages(request: ChatRequest) -> None:
    """Each message has the fields of its role, and each call of a tool is followed by its result."""
    unanswered: set[str] = set()
    for index, message in enumerate(request.messages):
        place = f"messages[{index}]"
        _check_message(message, place)
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                raise _invalid(f"{place}.tool_call_id", "it names no call of the assistant's message before it")
            unanswered.discard(str(message.tool_call_id))
        elif unanswered:
            raise _invalid(place, f"no message with the role tool answers {', '.join(sorted(unanswered))}")
        elif isinstance(message.tool_calls, tuple):
            unanswered = {call.id for call in message.tool_calls}
    if unanswered:
        raise _invalid("messages", f"no message with the role tool answers {', '.join(sorted(unanswered))}")


def _check_message(message: Message, place: str) -> None:
    calls = message.calls()
    for needed in ({"tool": "tool_call_id", "function": "name"}.get(message.role), None if calls else "content"):
        if needed is not None and getattr(message, needed) is UNSET:
            complaint = f"Object missing required field `{needed}`"
            raise Refused(400, complaint, code="missing_required_parameter", param=f"{place}.{needed}")
    if calls and message.role != "assistant":
        raise _invalid(place, "only the assistant makes calls")
    may_be_null = bool(calls) or message.role == "function" or isinstance(message.refusal, str)
    if message.content is None and not may_be_null:
        raise _invalid(f"{place}.content", "Expected `str | array`, got `null`")

    for index, part in enumerate(message.content if isinstance(message.content, tuple) else ()):
        if isinstance(part, ImagePart) and (reason := _image_complaint(part.image_url.url)):
            param = f"{place}.content[{index}].image_url.url"
            raise Refused(400, f"Invalid value for {param}: {reason}", code="invalid_image", param=param)


def _check_functions(param: str, functions: Sequence[Function], choice: object) -> None:
    """The functions, or the tools', have valid schemas and different names, and the chosen one is among them."""
    for index, function in enumerate(functions):
        if isinstance(function.parameters, dict):
            compiled(function.parameters, f"{param}[{index}]{'.function' * (param == 'tools')}.parameters")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise _invalid(param, "two have the same name")
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise _invalid("function_call.name", f"{choice.name!r} is not among the functions")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise _invalid("tool_choice.function.name", f"{choice.function.name!r} is not among the tools")


_DATA_URL = re.compile(r"data:image/(png|jpeg|gif|webp);base64,")
_SIGNATURES = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}


def _image_complaint(url: str) -> str | None:
    """The error in an image's URL; None: it is valid. No image is fetched."""
    if re.match(r"https?://[^/\s]+", url):
        return None
    start = _DATA_URL.match(url)
    if start is None:
        return "neither an http(s) URL nor a base64 data URL of a png, jpeg, gif or webp image"
    try:
        image = binascii.a2b_base64(url[start.end() :], strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        return f"the data URL is not base64: {error}"
    if not _SIGNATURES[start[1]].match(image):
        return f"the data is not a {start[1]} image"
    return None
