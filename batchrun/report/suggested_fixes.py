"""Reads a server's error message and suggests the setting that fixes it, with the flags that try it. PURE.

Servers of this API accept different parameters. The patterns cover the messages of OpenAI, Azure, Mistral, vLLM,
FastAPI and others. A fix is suggested only if the message names the parameter.
"""

import re
from collections.abc import Collection, Sequence

import msgspec

from batchrun.errors import quoted
from batchrun.job.settings import Endpoint
from batchrun.patterns import Pattern
from batchrun.response import other_apis
from batchrun.response.refusal_subjects import Subject, speaks_of


class Fix(msgspec.Struct, frozen=True):
    """Change `setting` as `what` says, with `--set` to `value`; None if a person must choose it.

    `same_command`: no flag is needed after the fix; the same command resumes the run.
    """

    setting: str
    what: str
    value: str | None = None
    same_command: bool = False

    @property
    def changes_the_question(self) -> bool:
        """True if answers received so far would belong to another question."""
        return self.setting.startswith("request.") and self.setting not in _HOW_IT_TRAVELS


_HOW_IT_TRAVELS = ("request.stream", "request.extra.stream_options")

_LIMITS = ("max_tokens", "max_completion_tokens")
_REQUEST = (
    *("reasoning_effort", "temperature", "top_p", "functions", "function_call", "response_format"),
    "image_detail",
)
"""Parameters that have a setting; any other is in `request.extra`."""

_EXTRA = (
    *("tools", "tool_choice", "parallel_tool_calls", "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "n"),
    *("presence_penalty", "frequency_penalty", "user", "metadata", "store", "service_tier", "verbosity", "top_k"),
    *("safety_identifier", "prompt_cache_key", "min_p", "repetition_penalty", "chat_template_kwargs", "reasoning"),
    *("guided_json", "thinking", "enable_thinking", "modalities", "prediction", "web_search_options"),
)

_REFUSES = Pattern(
    r"un(supported|recognized|known|expected)|not (supported|permitted|allowed|recognized|available|a valid)"
    r"|does(n't| not) support|only (supports?|the default)|extra (inputs|fields|parameters)|invalid|not be specified"
    r"|additional properties|deprecated|cannot be (used|set|specified)|is(n't| not) one of|not compatible|incompatible"
    r"|remove",
    re.IGNORECASE,
)
_WANTED = Pattern(
    r"\b(?:use|try|specify|provide|set|switch to|pass)\W{1,3}(max_(?:completion_)?tokens)\b", re.IGNORECASE
)
_NOT_TAKEN = Pattern(
    r"unsupported|unrecognized|unknown|unexpected|not (permitted|supported)|extra|does(n't| not) support", re.IGNORECASE
)
_ONLY_STREAMS = Pattern(
    r"only support\w*.{0,20}\bstream|must be stream|stream\b.{0,30}\b(required|must be (set to )?true)", re.IGNORECASE
)
_NEVER_STREAMS = Pattern(r"\bstream(ing)?\b\W.{0,20}not (supported|permitted|allowed)", re.IGNORECASE)
_BAD_SCHEMA = Pattern(r"invalid schema for response_format", re.IGNORECASE)
_AT_LEAST = Pattern(
    r"(?:>=|at least|greater than or equal to|minimum(?: allowed)?(?: value)?(?: is| of))\s*`?(\d{1,6})", re.IGNORECASE
)
_ABOVE = Pattern(r"\d+ > (\d{1,9}),? which is the max", re.IGNORECASE)
_ROOM = Pattern(r"context (?:length|window|size)(?: is| of)?:? (\d{1,9})", re.IGNORECASE)
_PROMPT = Pattern(
    r"(\d{1,9}) (?:tokens )?(?:in|from|of) (?:the |your )?(?:messages|prompt|input)|(\d{1,9}) input tokens"
)
_BOTH = Pattern(r"cannot both|not both|only one of|can(no|')t be used together|mutually exclusive", re.IGNORECASE)
_FORMAT = Pattern(r"response_format(?:\.type|\[.?type.?\])?\W.{0,20}\bmust be", re.IGNORECASE)
_CONTEXT = Pattern(r"context (length|window|size)", re.IGNORECASE)
_AT_MOST = Pattern(
    r"(?:at most|less than or equal to|maximum(?: allowed)?(?: value)?(?: is| of)?|up to|<=?|no more than|must be in|"
    r"range of \w+ (?:is|should be)|limit(?: is| of)?)\D{0,20}?(?:\[?\s*[01]\s*,\s*)?(\d{1,3}(?:,\d{3})+|\d+)",
    re.IGNORECASE,
)


def fix_for(message: str, settings: Collection[str] | None = None) -> Fix | None:
    """The fix for a server's error message; None if it names no parameter of ours.

    `settings` are the paths that the job sets: any other parameter came with the rows of the input.
    """
    readings = (_context, _limit, _role, _stream, _both, _parameter)
    fix = next((found for read in readings if (found := read(message)) is not None), None)
    if fix is None or settings is None or fix.value is None or not fix.changes_the_question:
        return fix
    parts = fix.setting.split(".")
    given = ".".join(parts[: 3 if parts[1] == "extra" else 2])
    if any(path == given or path.startswith(f"{given}.") for path in settings):
        return fix
    parameter = fix.setting.removeprefix("request.").removeprefix("extra.")
    return Fix(parameter, f"set by the rows of the input, not by the job: {fix.what}")


def fix_for_key(reason: str, endpoint: Endpoint) -> Fix | None:
    """Advice on the API key that the server rejected; None if the run stopped for another reason."""
    status = re.search(r"\bHTTP (4\d\d)\b", reason)
    if status is None or (status[1] != "401" and not speaks_of(Subject.KEY, reason)):
        return None
    setting, what = "api_key_env", "the server wants a key, and the job names none"
    if endpoint.api_key_env is not None:
        what = f"the server rejects the key in ${endpoint.api_key_env}"
    elif endpoint.api_key_file is not None:
        setting, what = "api_key_file", f"the server rejects the key in {endpoint.api_key_file}"
    elif endpoint.headers:
        setting, what = "headers", "the server rejects the key that they hold, if any"
    return Fix(f"endpoint.{setting}", what, same_command=True)


def fix_for_address(reason: str) -> Fix | None:
    """Advice if the address is wrong or can't be trusted; None if the run stopped for another reason."""
    if "CERTIFICATE_VERIFY_FAILED" in reason:
        what = "the certificate file of the authority that signed for the server, or for the proxy, if you trust it"
        return Fix("endpoint.ca_file", what, same_command=True)
    # behind a company's proxy, no name outside resolves
    if "never reached" in reason and "ClientConnectorDNSError" in reason:
        what = "is the host's name right? Behind a proxy set endpoint.proxy: HTTPS_PROXY is not read"
    elif "the server redirects to" in reason:
        what = "the address of the API itself, which redirects nowhere"
    elif (other := other_apis.named_in(reason)) is not None:
        what = f"{other.fix} (chat completions; the address that the job has gives {other.name})"
    elif re.search(r"^no answer for .*\bthe answer is (not a chat completion|empty)", reason) is not None:
        what = "is it the address of chat completions? A base such as https://host/v1 gets /chat/completions appended"
    else:
        return None
    return Fix("endpoint.url", what, same_command=True)


def command_with(line: Sequence[str], fix: Fix, *, retry: bool) -> str:
    """The command line, in words that are quoted for a shell, with the flag of the fix. `retry`: the run is complete,
    and its failed rows are sent.

    In an unfinished run, --accept-changes sends failed rows as another question. If the question stays the same,
    --retry-failed sends them after the pending rows.
    """
    consent = "--accept-changes" if fix.changes_the_question and not retry else "--retry-failed"
    kept = " ".join(word for word in line if word not in ("--new", consent))
    flag = "--set " + quoted(f"{fix.setting}={fix.value}")
    return f"{kept} {consent}" if f" {flag} " in f"{kept} " else f"{kept} {flag} {consent}"


def _names(message: str, parameter: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(parameter)}(?![\w-])", message) is not None


def _context(message: str) -> Fix | None:
    """An output limit that leaves no room in the context for the prompt, if the message gives the prompt's length."""
    room, prompt = _ROOM.search(message), _PROMPT.search(message)
    if room is None or prompt is None:
        return None
    left = int(room[1]) - int(prompt[1] or prompt[2])
    if left < 2:
        return None  # the prompt alone is too long, which no setting fixes
    less = str(max(1, left * 3 // 4))
    what = f"the context has room for {left} after this prompt; a quarter less leaves room for longer prompts"
    return Fix("request.max_tokens", what, less)


def _limit(message: str) -> Fix | None:
    """The output limit: under another name, too high or too low, or missing."""
    named = [match[0] for match in re.finditer(r"\bmax_(?:completion_|output_)?tokens\b", message)]
    if not named:
        return None
    if (least := _AT_LEAST.search(message)) is not None and int(least[1]) > 1:
        return Fix("request.max_tokens", f"at least {least[1]} here", least[1])
    setting = "endpoint.max_tokens_field"
    if (wanted := _WANTED.search(message)) is not None and _REFUSES.search(message):
        other = wanted[1].lower()
        return Fix(setting, f"this endpoint wants {other}", other)
    if _CONTEXT.search(message):
        return Fix("request.max_tokens", "lower it: prompt and answer must fit into the model's context")
    if (most := _ABOVE.search(message) or _AT_MOST.search(message)) is not None:
        number = most[1].replace(",", "")
        if int(number) > 0:
            return Fix("request.max_tokens", f"at most {number} here", number)
    if _NOT_TAKEN.search(message):
        other = _LIMITS[named[0] == "max_tokens"]
        return Fix(setting, f"this endpoint does not take {named[0]}", other)
    return Fix("request.max_tokens", "set it as the message says")


def _role(message: str) -> Fix | None:
    """The role `developer`, which older servers call `system`; or a model without system messages."""
    if re.search(r"\brole\b.{0,40}['\"`]system['\"`]|\bsystem\b.{0,12}\brole\b", message) and (
        _NOT_TAKEN.search(message) and "developer" not in message
    ):
        return Fix("request.system", "this model takes no system message: put it into the prompt")
    if "developer" not in message or not re.search(r"role|messages|system", message):
        return None
    if _REFUSES.search(message) is None:
        return None
    setting = "endpoint.developer_role"
    return Fix(setting, "this endpoint does not take the role developer", "system")


def _stream(message: str) -> Fix | None:
    if _names(message, "stream_options") and _REFUSES.search(message):
        setting = "request.extra.stream_options"
        return Fix(setting, "this endpoint does not take it; a stream may then bring no usage", "{}")
    if _ONLY_STREAMS.search(message):
        return Fix("request.stream", "this endpoint only streams", "true")
    if _NEVER_STREAMS.search(message):
        return Fix("request.stream", "this endpoint does not stream", "false")
    return None


def _both(message: str) -> Fix | None:
    """Two parameters that exclude each other; a type of response_format, or a schema that `strict` does not allow."""
    if _BAD_SCHEMA.search(message):
        setting = "request.response_format.strict"
        return Fix(setting, "strict does not allow this schema", "false")
    if _BOTH.search(message) and _names(message, "temperature") and _names(message, "top_p"):
        return Fix("request.top_p", "this endpoint takes only one of the two: leave it out", "")
    if _FORMAT.search(message):
        setting = "request.response_format"
        return Fix(setting, "this endpoint does not take this type: leave it out", "")
    return None


def _parameter(message: str) -> Fix | None:
    """Any other parameter: leave it out."""
    if _REFUSES.search(message) is None:
        return None
    named = [(message.find(name), name) for name in (*_REQUEST, *_EXTRA) if _quoted(message, name)]
    if not named:
        return None
    name = min(named)[1]
    setting = f"request.{name}" if name in _REQUEST else f"request.extra.{name}"
    return Fix(setting, "this endpoint does not take it, or not this value: leave it out", "")


def _quoted(message: str, name: str) -> bool:
    """True if the name is used as a parameter, not as an English word (`stop`, `user`, `store`)."""
    if "_" in name or name in ("temperature", "logprobs", "seed"):
        return _names(message, name)
    as_parameter = rf"['\"`.]{name}['\"`]|param(eter)?:? {name}\b|\bbody\.{name}\b|supplied: {name}\b"
    return re.search(as_parameter, message) is not None
