"""The tables of a job file: every setting with its type, its bounds and its default.

Each is documented in docs/job.md; a test compares that page with this module.
"""

from decimal import Decimal
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from batchrun.job import answer_schema

Positive = Annotated[float, Meta(gt=0, le=1e12)]  # not inf: clocks and token buckets can't calculate with it
AtLeastZero = Annotated[float, Meta(ge=0, le=1e12)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Text = Annotated[str, Meta(min_length=1)]
Effort = Literal["low", "medium", "high", "xhigh"]
Action = Literal["accept", "fail", "retry"]
Role = Literal["user", "assistant", "system", "developer"]

HeaderName = Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}$")]  # RFC 9110, section 5.6.2

ID_HEADER = "X-Client-Request-Id"
"""The header that carries our id of each attempt. Its name is ours alone, so it replaces no other client's header."""

VENDOR = ".vtrix.ai"
VENDOR_ID_HEADER = "X-Request-Id"
"""The header in which the vendor accepts a caller's id (docs/api.md, "Request"): its logs can be searched by our id."""

PATHS = {"chat": "/chat/completions", "responses": "/responses"}
"""The path of each dialect of the API, after a base such as `…/v1`."""

FROM_COLUMNS = frozenset({"model", "reasoning_effort", "max_tokens", "temperature", "top_p"})
"""The parameters that a column can set for each row."""

MAX_COST_USD = 10_000_000
"""No run costs more, so a higher cap is a typing mistake."""

MAX_PRICE_USD = 100_000
"""Per million tokens. A cost at a higher price would not fit decimal128(20, 12), the type of its column."""


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
    idle_timeout_s: Positive = 300.0  # a model that writes is seldom silent for a minute, but may pause to reason
    stream_timeout_s: Positive = 14_400.0  # 128,000 tokens at ten a second take 3.6 hours
    max_answer_bytes: AtLeastOne = 64_000_000
    client_request_id: bool = True
    request_id_header: HeaderName | None = None
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    developer_role: Literal["developer", "system"] = "developer"
    dialect: Literal["chat", "responses"] = "chat"
    transport: Literal["auto", "session"] = "auto"
    label: Text | None = None
    weight: Positive = 1.0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_in_flight: Annotated[int, Meta(ge=1, le=4096)] | None = None

    @property
    def base_path(self) -> str:
        """The path of the URL before that of the dialect."""
        return urlsplit(self.url).path.rstrip("/").removesuffix(PATHS[self.dialect])

    @property
    def full_url(self) -> str:
        """The whole URL that requests go to: a base such as `…/v1` gets the dialect's own path appended."""
        return urlsplit(self.url)._replace(path=self.base_path + PATHS[self.dialect]).geturl()

    @property
    def id_header(self) -> str | None:
        """The header that carries our id of each attempt; None: it is not sent."""
        if not self.client_request_id:
            return None
        if self.request_id_header is not None:
            return self.request_id_header
        vendor = f".{urlsplit(self.url).hostname or ''}".endswith(VENDOR)
        return VENDOR_ID_HEADER if vendor else ID_HEADER


ActorCount = Annotated[int, Meta(ge=1, le=1000)]

Reusable = Literal["ok", "truncated", "filtered", "refused", "empty", "invalid", "error"]
"""The statuses of earlier answers that may be reused."""


class Input(Table, frozen=True):
    path: Text | None = None
    partitions: dict[Text, Text | int | list[Text | int]] = {}
    id: Text | None = None
    dialect: Literal["auto", "columns", "messages", "openai-batch"] = "auto"
    min_rows: Count = 1  # an empty input usually means that a pipe broke
    max_line_bytes: AtLeastOne = 64_000_000
    dedupe: bool = True  # equal requests are sent once at any temperature; set it to false for several samples
    reuse_from: Text | tuple[Text, ...] = ()
    reuse_status: tuple[Reusable, ...] = ("ok", "filtered", "refused")
    max_changed: Text | Count | None = None
    image_root: Text | None = None
    max_image_bytes: AtLeastOne = 20_000_000  # the limit of common endpoints; a larger image is usually a mistake


class MessageTemplate(Table, frozen=True):
    """One message: a role and a template. With `column`, all messages that the row has in that column."""

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
        """A format that requires answers of the type `wanted`: anything that `answer_schema.schema_of` accepts.

        Raises:
            JobError: the type has no JSON schema.
        """
        name = getattr(wanted, "__name__", "answer")
        return cls(type="json_schema", name=name, schema=answer_schema.schema_of(wanted), strict=strict)


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
    service_tier: Text | None = None
    cache_prefix: bool = False
    extra: dict[str, Any] = {}
    from_columns: dict[str, str] = {}


class Tiers(Table, frozen=True):
    """The tier for rows for which `request.service_tier` has no capacity, or no time. None: they wait there."""

    fallback: Text | None = None
    after_refusals: AtLeastOne = 3


class Limits(Table, frozen=True):
    limits_are: Literal["whole", "per_process"] = "whole"  # with --shard: divided by the number of shards, or not
    requests_per_second: Positive | None = None
    requests_per_minute: Positive | None = None
    requests_per_day: AtLeastOne | None = None
    tokens_per_minute: Positive | None = None
    input_tokens_per_minute: Positive | None = None
    output_tokens_per_minute: Positive | None = None
    max_in_flight: Annotated[int, Meta(ge=1, le=4096)] = 64
    max_output_tokens: AtLeastOne = 128_000  # the model's maximum; the upper bound for a request without max_tokens
    max_image_tokens: AtLeastOne = 6_000  # more than any entry of the upstream's table of tile and patch counts


class Engine(Table, frozen=True):
    """The processes that send: this one, or actors of a Ray cluster."""

    name: Literal["local", "ray"] = "local"
    ray_address: Text | None = None
    actors: ActorCount = 2
    max_actors: ActorCount | None = None
    requests_per_actor: AtLeastOne = 256
    cpus_per_actor: AtLeastZero = 1.0
    start_timeout_s: Positive = 300.0


class Retry(Table, frozen=True):
    max_attempts: AtLeastOne = 6
    max_5xx: AtLeastOne = 4
    max_maybe_billed: Count = 1
    invalid: Count = 0  # each retry is paid for, and a model that is wrong twice rarely gets it right
    max_wait_s: Positive = 900.0  # the longest Retry-After that a row waits for; the run pauses for a longer one
    max_outage_s: Positive = 7200.0
    backoff_base_s: Positive = 1.0
    backoff_cap_s: Positive = 60.0


class Finish(Table, frozen=True):
    """Whether an answer is a success, a failure or is retried, by its finish_reason. `other`: unknown, or missing."""

    stop: Action = "accept"
    length: Action = "accept"
    function_call: Action = "accept"
    content_filter: Action = "accept"
    refusal: Action = "accept"
    empty: Action = "fail"
    other: Action = "accept"


class Budget(Table, frozen=True):
    max_cost_usd: Decimal | None = None
    max_tokens: AtLeastOne | None = None
    max_requests: AtLeastOne | None = None
    per_start_usd: Decimal | None = None
    per_day_usd: Decimal | None = None
    per_month_usd: Decimal | None = None
    name: Text | None = None
    state: Text = "runs/budget.db"
    time_zone: Text = "UTC"

    @property
    def caps_usd(self) -> dict[str, Decimal]:
        """The caps on cost that are set, by the names of their settings."""
        names = ("max_cost_usd", "per_start_usd", "per_day_usd", "per_month_usd")
        caps = {name: getattr(self, name) for name in names}
        return {name: cap for name, cap in caps.items() if cap is not None}


Share = Annotated[float, Meta(ge=0, le=1)]


class Canary(Table, frozen=True):
    """How many rows are sent first, and the results required before the other rows are sent."""

    rows: Annotated[int, Meta(ge=1, le=10_000)] | None = None
    min_ok_share: Share = 0.9
    max_invalid_share: Share | None = None
    max_cost_per_row_usd: Decimal | None = None


class Output(Table, frozen=True):
    path: Text = "runs/{job}/{date}"
    state_dir: Text | None = None
    columns: Literal["all"] | list[str] = "all"
    prefix: str = ""
    raw: Literal["failed", "always"] = "failed"
    layout: Literal["file", "parts"] = "file"
    format: Literal["parquet", "jsonl", "jsonl.gz", "jsonl.zst"] = "parquet"
    partition_by: list[Text] = []
    dataset: Text | None = None
    max_partitions: AtLeastOne = 1000  # each is a folder and a file; pyarrow's own limit is 1,024
    compression: Literal["zstd", "snappy", "gzip", "none"] = "zstd"
    chunk_rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 8192
    chunk_bytes: AtLeastOne = 32_000_000
    max_failures: Count = 0
    partial: bool = False
    keep_parts_remote: bool = False

    @property
    def keep_raw(self) -> bool:
        """Whether the result has the response of every row, not only of those that went wrong."""
        return self.raw == "always"

    @property
    def is_one_file(self) -> bool:
        """Whether the result is one Parquet file with everything in it, which needs no parts any more."""
        return self.layout == "file" and not self.partition_by and self.format == "parquet"


class TierPrice(Table, frozen=True):
    """USD per million tokens in one service tier."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None


class Price(Table, frozen=True):
    """USD per million tokens; `per_request` is USD for each answered request. `tiers` are other prices for some service
    tiers, by the name that an answer states."""

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    per_request: Decimal | None = None
    tiers: dict[str, TierPrice] = {}


class Telemetry(Table, frozen=True):
    """The figures of a run that other programs get while it works."""

    prometheus_dir: Text | None = None
    otel: bool = False
    request_spans: Share = 0.0


class Simulator(Table, frozen=True):
    latency_s: AtLeastZero = 0.4
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    faults: str = ""
    flex_latency_s: AtLeastZero | None = None
    cache_life_s: AtLeastZero | None = None
    seed: int = 0
    ledger: Text | None = None


TagName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,60}$")]  # becomes a column of a bill: `tag.team`

TagValue = Annotated[str, Meta(min_length=1, max_length=200)]


class Storage(Table, frozen=True):
    """How to reach object stores, where the environment does not say it."""

    endpoint: Text | None = None
    region: Text | None = None
    anonymous: bool = False


class About(Table, frozen=True):
    """Facts for the bill. `tags` never change what is sent."""

    tags: dict[TagName, TagValue] = {}
