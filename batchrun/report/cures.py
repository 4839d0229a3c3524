"""The setting that cures a refusal which names a parameter, and the flags that try it. PURE.

Servers of this API differ in which parameters they take; the words are those of OpenAI, Azure, Mistral, vLLM, FastAPI
and others. A cure is proposed only where the refusal names the parameter.
"""

import re
import shlex
from collections.abc import Collection, Sequence

import msgspec


class Cure(msgspec.Struct, frozen=True):
    """`setting` is to be changed as `what` says; `flags` do that for one start, none where a person must choose."""

    setting: str
    what: str
    flags: tuple[str, ...] = ()

    @property
    def changes_the_question(self) -> bool:
        """True where answers that are there already would be answers to another question."""
        return self.setting.startswith("request.") and self.setting not in _HOW_IT_TRAVELS


_HOW_IT_TRAVELS = ("request.stream", "request.extra.stream_options")

_LIMITS = ("max_tokens", "max_completion_tokens")
_REQUEST = (
    *("reasoning_effort", "temperature", "top_p", "functions", "function_call", "response_format"),
    "image_detail",
)
"""Parameters that have a setting of their own; any other is one of `request.extra`."""

_EXTRA = (
    *("tools", "tool_choice", "parallel_tool_calls", "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "n"),
    *("presence_penalty", "frequency_penalty", "user", "metadata", "store", "service_tier", "verbosity", "top_k"),
    *("safety_identifier", "prompt_cache_key", "min_p", "repetition_penalty", "chat_template_kwargs", "reasoning"),
    *("guided_json", "thinking", "enable_thinking", "modalities", "prediction", "web_search_options"),
)

_REFUSES = re.compile(
    r"un(supported|recognized|known|expected)|not (supported|permitted|allowed|recognized|available|a valid)"
    r"|does(n't| not) support|only (supports?|the default)|extra (inputs|fields|parameters)|invalid|not be specified"
    r"|additional properties|deprecated|cannot be (used|set|specified)|is(n't| not) one of|not compatible|incompatible"
    r"|remove",
    re.IGNORECASE,
)
_WANTED = re.compile(
    r"\b(?:use|try|specify|provide|set|switch to|pass)\W{1,3}(max_(?:completion_)?tokens)\b", re.IGNORECASE
)
_NOT_TAKEN = re.compile(
    r"unsupported|unrecognized|unknown|unexpected|not (permitted|supported)|extra|does(n't| not) support", re.IGNORECASE
)
_ONLY_STREAMS = re.compile(
    r"only support\w*.{0,20}\bstream|must be stream|stream\b.{0,30}\b(required|must be (set to )?true)", re.IGNORECASE
)
_NEVER_STREAMS = re.compile(r"\bstream(ing)?\b\W.{0,20}not (supported|permitted|allowed)", re.IGNORECASE)
_BAD_SCHEMA = re.compile(r"invalid schema for response_format", re.IGNORECASE)
_AT_LEAST = re.compile(
    r"(?:>=|at least|greater than or equal to|minimum(?: allowed)?(?: value)?(?: is| of))\s*`?(\d{1,6})", re.IGNORECASE
)
_ABOVE = re.compile(r"\d+ > (\d{1,9}),? which is the max", re.IGNORECASE)
_ROOM = re.compile(r"context (?:length|window|size)(?: is| of)?:? (\d{1,9})", re.IGNORECASE)
_PROMPT = re.compile(
    r"(\d{1,9}) (?:tokens )?(?:in|from|of) (?:the |your )?(?:messages|prompt|input)|(\d{1,9}) input tokens"
)
_BOTH = re.compile(r"cannot both|not both|only one of|can(no|')t be used together|mutually exclusive", re.IGNORECASE)
_FORMAT = re.compile(r"response_format(?:\.type|\[.?type.?\])?\W.{0,20}\bmust be", re.IGNORECASE)
_CONTEXT = re.compile(r"context (length|window|size)", re.IGNORECASE)
_AT_MOST = re.compile(
    r"(?:at most|less than or equal to|maximum(?: allowed)?(?: value)?(?: is| of)?|up to|<=?|no more than|must be in|"
    r"range of \w+ (?:is|should be)|limit(?: is| of)?)\D{0,20}?(?:\[?\s*[01]\s*,\s*)?(\d{1,3}(?:,\d{3})+|\d+)",
    re.IGNORECASE,
)


def cure_of(message: str, settings: Collection[str] | None = None) -> Cure | None:
    """The cure for what a server says of a request; None where its words name no parameter of ours.

    `settings` are the paths that the job sets: a parameter that is none of them came with the rows.
    """
    looks = (_context, _limit, _role, _stream, _schema, _both, _parameter)
    cure = next((found for look in looks if (found := look(message)) is not None), None)
    if cure is None or settings is None or not cure.flags or not cure.changes_the_question:
        return cure
    parts = cure.setting.split(".")
    given = ".".join(parts[: 3 if parts[1] == "extra" else 2])
    if any(path == given or path.startswith(f"{given}.") for path in settings):
        return cure
    parameter = cure.setting.removeprefix("request.").removeprefix("extra.")
    return Cure(parameter, f"the rows of the input bring it, and not the job: {cure.what}")


def command(words: Sequence[str], cure: Cure, *, retry: bool) -> list[str]:
    """The command line `words` with the flags of the cure; `retry`: for rows of a complete run that failed.

    In an unfinished run --accept-changes sends rows that failed as another question; where the question is the same,
    --retry-failed sends them once the pending rows are settled.
    """
    consent = "--accept-changes" if cure.changes_the_question and not retry else "--retry-failed"
    kept = [word for word in words if word not in ("--new", consent)]
    flags = [] if shlex.join(cure.flags) in shlex.join(kept) else cure.flags
    return [*kept, *flags, consent]


def _set(setting: str, value: str) -> tuple[str, ...]:
    return ("--set", f"{setting}={value}")


def _names(message: str, parameter: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(parameter)}(?![\w-])", message) is not None


def _context(message: str) -> Cure | None:
    """A limit of output that leaves the context no room for the prompt, where the message says how long that is."""
    room, prompt = _ROOM.search(message), _PROMPT.search(message)
    if room is None or prompt is None:
        return None
    left = int(room[1]) - int(prompt[1] or prompt[2])
    if left < 2:
        return None  # the prompt alone is too long, which no setting cures
    less = str(max(1, left * 3 // 4))
    what = f"the context holds {left} beside this prompt; a quarter less leaves room for longer ones"
    return Cure("request.max_tokens", what, _set("request.max_tokens", less))


def _limit(message: str) -> Cure | None:
    """The limit of output: under another name, lower, or asked for."""
    named = [match[0] for match in re.finditer(r"\bmax_(?:completion_|output_)?tokens\b", message)]
    if not named:
        return None
    if (least := _AT_LEAST.search(message)) is not None and int(least[1]) > 1:
        return Cure("request.max_tokens", f"at least {least[1]} here", _set("request.max_tokens", least[1]))
    setting = "endpoint.max_tokens_field"
    if (wanted := _WANTED.search(message)) is not None and _REFUSES.search(message):
        other = wanted[1].lower()
        return Cure(setting, f"this endpoint wants {other}", _set(setting, other))
    if _CONTEXT.search(message):
        return Cure("request.max_tokens", "lower it: the model's context holds prompt and answer")
    if (most := _ABOVE.search(message) or _AT_MOST.search(message)) is not None:
        number = most[1].replace(",", "")
        if int(number) > 0:
            return Cure("request.max_tokens", f"at most {number} here", _set("request.max_tokens", number))
    if _NOT_TAKEN.search(message):
        other = _LIMITS[named[0] == "max_tokens"]
        return Cure(setting, f"this endpoint does not take {named[0]}", _set(setting, other))
    return Cure("request.max_tokens", "set it as the message says")


def _role(message: str) -> Cure | None:
    """The role `developer` under the name that older servers know; a `system` that a model knows not at all."""
    if re.search(r"\brole\b.{0,40}['\"`]system['\"`]|\bsystem\b.{0,12}\brole\b", message) and (
        _NOT_TAKEN.search(message) and "developer" not in message
    ):
        return Cure("request.system", "this model takes no system message: say it in the prompt")
    if "developer" not in message or not re.search(r"role|messages|system", message):
        return None
    if _REFUSES.search(message) is None:
        return None
    setting = "endpoint.developer_role"
    return Cure(setting, "this endpoint does not take the role developer", _set(setting, "system"))


def _stream(message: str) -> Cure | None:
    if _names(message, "stream_options") and _REFUSES.search(message):
        setting = "request.extra.stream_options"
        return Cure(setting, "this endpoint does not take it; a stream may then bring no usage", _set(setting, "{}"))
    if _ONLY_STREAMS.search(message):
        return Cure("request.stream", "this endpoint only streams", _set("request.stream", "true"))
    if _NEVER_STREAMS.search(message):
        return Cure("request.stream", "this endpoint does not stream", _set("request.stream", "false"))
    return None


def _schema(message: str) -> Cure | None:
    """A schema that is sound, but not what `strict` takes."""
    if _BAD_SCHEMA.search(message):
        setting = "request.response_format.strict"
        return Cure(setting, "the schema is not one that strict takes", _set(setting, "false"))
    return None


def _both(message: str) -> Cure | None:
    """Two parameters of which one goes."""
    if _BOTH.search(message) and _names(message, "temperature") and _names(message, "top_p"):
        return Cure("request.top_p", "this endpoint takes one of both: leave it out", _set("request.top_p", ""))
    if _FORMAT.search(message):
        setting = "request.response_format"
        return Cure(setting, "this endpoint does not take this type: leave it out", _set(setting, ""))
    return None


def _parameter(message: str) -> Cure | None:
    """Any other parameter: it is left out."""
    if _REFUSES.search(message) is None:
        return None
    named = [(message.find(name), name) for name in (*_REQUEST, *_EXTRA) if _quoted(message, name)]
    if not named:
        return None
    name = min(named)[1]
    setting = f"request.{name}" if name in _REQUEST else f"request.extra.{name}"
    return Cure(setting, "this endpoint does not take it, or not this value: leave it out", _set(setting, ""))


def _quoted(message: str, name: str) -> bool:
    """True where the name stands as a parameter's, and not as an English word (`stop`, `user`, `store`)."""
    if "_" in name or name in ("temperature", "logprobs", "seed"):
        return _names(message, name)
    as_parameter = rf"['\"`.]{name}['\"`]|param(eter)?:? {name}\b|\bbody\.{name}\b|supplied: {name}\b"
    return re.search(as_parameter, message) is not None
