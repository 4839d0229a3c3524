"""One frozen, typed `Job` from a TOML file and overrides; a mistake names its path and the nearest known name.

Every setting is documented in docs/job.md; a test holds that page and this module together.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from batchrun.errors import JobError
from batchrun.job import expected
from batchrun.job.mistakes import explain

Positive = Annotated[float, Meta(gt=0, le=1e12)]  # not inf: no clock or bucket can reckon with it
AtLeastZero = Annotated[float, Meta(ge=0, le=1e12)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]
Effort = Literal["low", "medium", "high", "xhigh"]
Action = Literal["accept", "fail", "retry"]
Role = Literal["user", "assistant", "system", "developer"]

SIMULATOR = "simulator"

MAX_PRICE_USD = 100_000
"""Per million tokens. Beyond it a cost would leave decimal128(20, 12), the column it is stored in."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A table of the job file: frozen, and strict about names."""


class Endpoint(Table, frozen=True):
    url: Text
    name: Text | None = None
    api_key_env: Text | None = None
    api_key_file: Text | None = None
    auth: Literal["bearer", "none"] = "bearer"
    headers: dict[str, str] = {}
    ca_file: Text | None = None
    proxy: Text | None = None
    connect_timeout_s: Positive = 10.0
    attempt_timeout_s: Positive = 900.0  # long reasoning calls; counted from the send, not from queueing
    idle_timeout_s: Positive = 300.0  # who writes is seldom silent for a minute, but may stop to think again
    stream_timeout_s: Positive = 14_400.0  # 128,000 tokens at ten a second take 3.6 hours
    max_answer_bytes: AtLeastOne = 64_000_000
    client_request_id: bool = True
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    developer_role: Literal["developer", "system"] = "developer"


class Input(Table, frozen=True):
    path: Text | None = None
    id: Text | None = None
    dialect: Literal["auto", "columns", "messages", "openai-batch"] = "auto"
    max_line_bytes: AtLeastOne = 64_000_000
    image_root: Text | None = None
    max_image_bytes: AtLeastOne = 20_000_000  # what common endpoints take; a larger one is mostly a mistake


class MessageTemplate(Table, frozen=True):
    """One message: a role and a template; or, with `column`, as many as the row has there."""

    role: Role | None = None
    content: str | list[dict[str, Any]] | None = None
    column: Text | None = None


class ResponseFormat(Table, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    file: Text | None = None
    name: Text = "answer"
    schema: dict[str, Any] | None = None
    strict: bool = True

    @classmethod
    def of(cls, wanted: Any, *, strict: bool = True) -> "ResponseFormat":
        """Answers of this type and no others: whatever `expected.schema_of` takes. Named as the type is.

        Raises:
            JobError: it has no JSON schema.
        """
        name = getattr(wanted, "__name__", "answer")
        return cls(type="json_schema", name=name, schema=expected.schema_of(wanted), strict=strict)


class Function(Table, frozen=True):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None


class FunctionName(Table, frozen=True):
    name: Text


class RequestTemplate(Table, frozen=True):
    model: Text | None = None
    system: Text | None = None
    prompt: Text | None = None
    messages: Text | Annotated[list[MessageTemplate], Meta(min_length=1)] | None = None
    images: list[Text] = []
    image_detail: Literal["auto", "low", "high"] | None = None
    reasoning_effort: Effort | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=128_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stream: bool = False
    functions: list[Function] | None = None
    function_call: str | FunctionName | None = None
    response_format: ResponseFormat | None = None
    extra: dict[str, Any] = {}
    from_columns: dict[str, str] = {}


class Limits(Table, frozen=True):
    requests_per_second: Positive | None = None
    requests_per_minute: Positive | None = None
    requests_per_day: AtLeastOne | None = None
    tokens_per_minute: Positive | None = None
    input_tokens_per_minute: Positive | None = None
    output_tokens_per_minute: Positive | None = None
    max_in_flight: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_output_tokens: AtLeastOne = 128_000  # the model's own maximum; the bound of a request without max_tokens
    max_image_tokens: AtLeastOne = 6_000  # above all of the upstream's own table of tile and patch counts


class Retry(Table, frozen=True):
    max_attempts: AtLeastOne = 6
    max_5xx: AtLeastOne = 4
    max_maybe_billed: Count = 1
    invalid: Count = 0  # each is paid for again, and a model that answers wrongly twice rarely mends it
    max_wait_s: Positive = 900.0  # the longest Retry-After obeyed; beyond it the run pauses
    max_outage_s: Positive = 7200.0
    backoff_base_s: Positive = 1.0
    backoff_cap_s: Positive = 60.0


class Finish(Table, frozen=True):
    """What an answer is worth by its finish_reason. `other`: any other reason, or none."""

    stop: Action = "accept"
    length: Action = "accept"
    function_call: Action = "accept"
    content_filter: Action = "accept"
    empty: Action = "fail"
    other: Action = "accept"


class Budget(Table, frozen=True):
    max_cost_usd: Decimal | None = None
    max_tokens: AtLeastOne | None = None
    max_requests: AtLeastOne | None = None


class Output(Table, frozen=True):
    path: Text = "runs/{job}/{date}"
    columns: Literal["all"] | list[str] = "all"
    prefix: str = ""
    raw: Literal["failed", "always"] = "failed"
    layout: Literal["file", "parts"] = "file"
    compression: Literal["zstd", "snappy", "gzip", "none"] = "zstd"
    chunk_rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 8192
    chunk_bytes: AtLeastOne = 32_000_000
    max_failures: Count = 0


class Price(Table, frozen=True):
    """USD per million tokens."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None


class Simulator(Table, frozen=True):
    latency_s: AtLeastZero = 0.4
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    faults: str = ""
    seed: int = 0
    ledger: Text | None = None


class Job(Table, frozen=True):
    """What to ask, of whom, within which limits. Holds no secret. `name` is the job file's stem."""

    endpoint: Endpoint
    request: RequestTemplate = RequestTemplate()
    name: Text = "job"
    input: Input = Input()
    limits: Limits = Limits()
    retry: Retry = Retry()
    finish: Finish = Finish()
    budget: Budget = Budget()
    output: Output = Output()
    pricing: dict[str, Price] = {}
    simulator: Simulator = Simulator()

    @property
    def simulated(self) -> bool:
        """True when the job asks for the built-in simulator."""
        return self.endpoint.url == SIMULATOR

    @property
    def url(self) -> str:
        """The whole URL that requests go to: a base such as `…/v1` gets `/chat/completions` appended."""
        parts = urlsplit(self.endpoint.url)
        path = parts.path.rstrip("/")
        whole = path if path.endswith("/chat/completions") else f"{path}/chat/completions"
        return parts._replace(path=whole).geturl()

    @property
    def endpoint_name(self) -> str:
        """Whose answers these are: part of every request_key. Two URLs of one server may share a name."""
        if self.endpoint.name is not None:
            return self.endpoint.name
        if self.simulated:
            return SIMULATOR
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}{parts.path}"

    def question(self) -> dict[str, Any]:
        """What decides the questions, as plain values by setting: a change here means other answers."""
        settings = flatten(msgspec.to_builtins(self.request, str_keys=True), "request")
        settings["endpoint.name"] = self.endpoint_name
        settings["input.dialect"] = self.input.dialect
        # how an answer travels is not what was asked
        return {path: value for path, value in settings.items() if not path.startswith(_HOW_IT_TRAVELS)}

    def fingerprint(self) -> str:
        """The digest of `question()`: equal fingerprints ask equal questions of equal rows."""
        return hashlib.blake2b(msgspec.json.encode(self.question(), order="sorted"), digest_size=16).hexdigest()


def load(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the TOML file at `path`, with `a.b=c` overrides laid over it.

    Raises:
        JobError: unreadable, not TOML, or a setting that does not fit; the message names its path.
    """
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise JobError(f"{path}: can't read the job file: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    tables.setdefault("name", path.stem)
    try:
        return from_tables(tables)
    except JobError as error:
        raise JobError(f"{_origin(path, overrides, str(error))}: {error}") from error


def _origin(path: Path, overrides: Sequence[str], problem: str) -> str:
    """Where the setting that the problem begins with was made: in the job file, or over it."""
    names = (".".join(_keys(override.partition("=")[0])) for override in overrides)
    over = any(re.match(rf"{re.escape(name)}[.:\[]", problem) for name in names)
    return f"set over {path} (by --set or an option)" if over else str(path)


def from_tables(tables: Mapping[str, Any]) -> Job:
    """The checked Job that `tables` (as TOML gives them) describe."""
    try:
        job = msgspec.convert(tables, Job)
    except msgspec.ValidationError as error:
        known = [name for name, _ in settings()] + list(Job.__struct_fields__)
        raise JobError(explain(str(error), tables, Job, known)) from error
    if problem := next(_problems(job), None):
        raise JobError(problem)
    response_format = job.request.response_format
    if response_format is not None and response_format.file is not None:
        resolved = msgspec.structs.replace(response_format, schema=_read_schema(response_format.file), file=None)
        job = msgspec.structs.replace(job, request=msgspec.structs.replace(job.request, response_format=resolved))
    return job


def checked(job: Job) -> Job:
    """The job, built in code, as a file that says the same would give it: the same checks, messages and fingerprint.

    Raises:
        JobError: a setting does not fit; the message names its path.
    """
    kept = (datetime, date, time, Decimal)
    return from_tables(msgspec.to_builtins(job, builtin_types=kept, str_keys=True, enc_hook=_plain))


def _plain(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise JobError(
        f"the job holds a {type(value).__name__}, which is no setting's value; docs/job.md lists every setting"
    )


def settings() -> Iterator[tuple[str, object]]:
    """Every setting a job file can hold, as (path, default); `msgspec.NODEFAULT` where one is required."""
    for table in msgspec.structs.fields(Job):
        structs = [t for t in (table.type, *get_args(table.type)) if isinstance(t, type)]
        inner = next((t for t in structs if issubclass(t, Table)), None)
        if inner is None:
            yield table.name, table.default
            continue
        path = f"{table.name}.MODEL" if inner is Price else table.name
        for field in msgspec.structs.fields(inner):
            default = field.default_factory() if field.default_factory in (dict, list) else field.default
            yield f"{path}.{field.name}", default


_HOW_IT_TRAVELS = ("request.stream", "request.extra.stream_options")


def flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested tables as one level of dotted paths; lists and empty tables stay whole."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict) and value:
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


_SECRET = re.compile(r"(^|[._-])(api_?key|key|token|secret|password|authorization)$", re.IGNORECASE)


def _override(tables: dict[str, Any], override: str) -> None:
    """Lay one `a.b=c` over the tables; the path is read as a TOML key, the value as TOML, else as a plain string."""
    path, equals, text = override.partition("=")
    keys = _keys(path)
    if not equals or not keys:
        raise JobError(f"--set {path}: expected table.setting=value")
    if any(_SECRET.search(key) for key in keys):
        raise JobError(f"--set {path}: a secret does not belong on a command line; use endpoint.api_key_env")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = keys
    table = tables
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise JobError(f"--set {path}: {parent} is no table")
    table[last] = value


def _keys(path: str) -> list[str]:
    """The names in a dotted TOML key, which may quote those that hold dots; [] if it is none."""
    try:
        tree = tomllib.loads(f"{path} = 0")
    except tomllib.TOMLDecodeError:
        return []
    keys: list[str] = []
    while isinstance(tree, dict) and len(tree) == 1:
        ((key, tree),) = tree.items()
        keys.append(key)
    return keys


def _problems(job: Job) -> Iterator[str]:
    """What types can't say. The first one is told."""
    request = job.request
    yield from _endpoint_problems(job.endpoint)
    if request.prompt is not None and request.messages is not None:
        yield "request.prompt: can't stand beside request.messages; keep one of them"
    if request.system is not None and isinstance(request.messages, list):
        yield "request.system: put it into request.messages as a message with role = 'system'"
    for place, each in enumerate(request.messages if isinstance(request.messages, list) else ()):
        if [each.role is None, each.content is None, each.column is None] not in (
            [False, False, True],
            [True, True, False],
        ):
            yield f"request.messages[{place}]: expected a `role` with its `content`, or a `column` that holds messages"
    if request.image_detail is not None and not request.images:
        yield "request.image_detail: names the detail of request.images, and there are none"
    if request.response_format is not None and request.response_format.type == "json_schema":
        given = (request.response_format.file is not None) + (request.response_format.schema is not None)
        if given != 1:
            yield "request.response_format: a json_schema needs one of `file` or `schema`"
    if isinstance(request.function_call, str) and request.function_call not in ("none", "auto"):
        yield 'request.function_call: expected "none", "auto" or { name = "…" }'
    own = set(RequestTemplate.__struct_fields__) - {"extra", "from_columns"}
    for name in request.extra.keys() & own:
        yield f"request.extra.{name}: this one has a setting of its own, request.{name}"
    for name in request.from_columns.keys() - FROM_COLUMNS:
        yield f"request.from_columns.{name}: expected one of {', '.join(sorted(FROM_COLUMNS))}"
    yield from _json_problems(request)
    yield from _schema_problems(request)
    if (cap := job.budget.max_cost_usd) is not None and not (cap.is_finite() and cap > 0):
        yield f"budget.max_cost_usd: expected more than 0 (is {cap})"
    for model, price in job.pricing.items():
        for name in Price.__struct_fields__:
            usd: Decimal | None = getattr(price, name)
            if usd is not None and not (usd.is_finite() and 0 <= usd <= MAX_PRICE_USD):
                yield f"pricing.{model}.{name}: expected 0 to {MAX_PRICE_USD:,} USD per million tokens (is {usd})"


def _schema_problems(request: RequestTemplate) -> Iterator[str]:
    """Answers are held against the job's schemas: they must be such, and whole."""
    schemas = {f"request.functions[{i}].parameters": each.parameters for i, each in enumerate(request.functions or ())}
    if request.response_format is not None:
        schemas["request.response_format.schema"] = request.response_format.schema
    for path, schema in schemas.items():
        if schema is not None and (problem := expected.problem(schema)) is not None:
            yield f"{path}: {problem}"


def _json_problems(request: RequestTemplate) -> Iterator[str]:
    """TOML's dates, nan and inf would reach the API as texts and nulls that nobody wrote."""
    asked = msgspec.to_builtins(request, builtin_types=(datetime, date, time))
    for path, value in flatten(asked, "request").items():
        if msgspec.json.decode(msgspec.json.encode(value)) != value:
            yield f"{path}: JSON has no such value (is {value}); dates belong in quotes"


FROM_COLUMNS = frozenset({"model", "reasoning_effort", "max_tokens", "temperature", "top_p"})
"""The parameters that a column can set row by row."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def _endpoint_problems(endpoint: Endpoint) -> Iterator[str]:
    if endpoint.url == SIMULATOR:
        return
    try:
        parts = urlsplit(endpoint.url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets and of a port that is none
        usable = False
    if not usable:
        yield f'endpoint.url: expected an http(s) URL or "simulator" (is {endpoint.url!r})'
        return
    if parts.username or parts.password or "key=" in parts.query:
        yield "endpoint.url: holds a secret; use endpoint.api_key_env"
    if endpoint.api_key_env and endpoint.api_key_file:
        yield "endpoint.api_key_file: can't stand beside endpoint.api_key_env; keep one of them"
    given = endpoint.api_key_env or endpoint.api_key_file
    if given and endpoint.auth == "none":
        yield 'endpoint.auth: "none" can\'t stand beside a key; keep one of them'
    if not given and not endpoint.headers and endpoint.auth != "none":
        yield (
            "endpoint.api_key_env: name the environment variable that holds the key (or api_key_file); "
            'or set endpoint.auth = "none" for a server that wants none'
        )
    if endpoint.proxy is not None and "@" in endpoint.proxy:
        yield "endpoint.proxy: holds a secret; name a proxy that needs no password, such as a local one that adds it"
    keyless = endpoint.auth == "none" and not any(value.startswith("env:") for value in endpoint.headers.values())
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not keyless:
        yield f"endpoint.url: the key would travel unencrypted to {parts.hostname}; use https://"
    for name, value in endpoint.headers.items():
        if _SECRET.search(name) and not value.startswith("env:"):
            yield f'endpoint.headers.{name}: a job file holds no secret; write "env:NAME"'


def _read_schema(file: str) -> dict[str, Any]:
    """The JSON schema in `file`, as the request carries it."""
    try:
        schema = msgspec.json.decode(Path(file).read_bytes())
    except OSError as error:
        raise JobError(f"request.response_format.file: can't read {file}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise JobError(f"request.response_format.file: {file} is not JSON: {error}") from error
    if not isinstance(schema, dict):
        raise JobError(f"request.response_format.file: {file} holds no JSON object")
    if (problem := expected.problem(schema)) is not None:
        raise JobError(f"request.response_format.file: {file}: {problem}")
    return schema
