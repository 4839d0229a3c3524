"""Validates what types can't: settings that exclude each other, secrets in the job file. PURE."""

import re
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from batchrun.job import answer_schema
from batchrun.job.fields import CHAT_ONLY
from batchrun.job.job import SIMULATOR, Job, flatten
from batchrun.job.settings import (
    FROM_COLUMNS,
    MAX_COST_USD,
    MAX_PRICE_USD,
    PATHS,
    Endpoint,
    Limits,
    Price,
    RequestTemplate,
)

SECRET = re.compile(r"(^|[._-])(api_?key|key|token|secret|password|authorization)$", re.IGNORECASE)
"""Names of settings that hold a secret."""

REPLACE_IN_ONE_STEP = frozenset({"s3", "s3a", "s3n", "gs", "gcs"})
"""Schemes of stores that show an object's old content until the new one is whole."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def problems(job: Job) -> Iterator[str]:
    """Every problem of the job, each in one line that starts with the setting's path."""
    request = job.request
    several = len(job.endpoints) > 1
    for place, endpoint in enumerate(job.endpoints):
        for problem in _endpoint_problems(endpoint):
            yield f"endpoint[{place}]{problem.removeprefix('endpoint')}" if several else problem
    yield from _pool_problems(job) if several else _single_problems(job.endpoint)
    if job.name.startswith("/") or not {"", ".", ".."}.isdisjoint(job.name.split("/")):
        yield f"name: is a folder in output.path ({{job}}), so it can't have empty parts, '.' or '..' (is {job.name!r})"
    if request.prompt is not None and request.messages is not None:
        yield "request.prompt: conflicts with request.messages; keep one of them"
    if request.system is not None and isinstance(request.messages, list):
        yield "request.system: put it into request.messages as a message with role = 'system'"
    for place, each in enumerate(request.messages if isinstance(request.messages, list) else ()):
        if [each.role is None, each.content is None, each.column is None] not in (
            [False, False, True],
            [True, True, False],
        ):
            yield f"request.messages[{place}]: expected a `role` with its `content`, or a `column` that holds messages"
    if request.image_detail is not None and not request.images:
        yield "request.image_detail: applies to request.images, which is not set"
    if request.response_format is not None and request.response_format.type == "json_schema":
        given = (request.response_format.file is not None) + (request.response_format.schema is not None)
        if given != 1:
            yield "request.response_format: a json_schema needs one of `file` or `schema`"
    if isinstance(request.function_call, str) and request.function_call not in ("none", "auto"):
        yield 'request.function_call: expected "none", "auto" or { name = "…" }'
    own = set(RequestTemplate.__struct_fields__) - {"extra", "from_columns"}
    for name in request.extra.keys() & own:
        yield f"request.extra.{name}: has its own setting, request.{name}"
    limited = request.max_tokens is not None or "max_tokens" in request.from_columns
    if limited and "max_completion_tokens" in request.extra:
        yield (
            "request.extra.max_completion_tokens: conflicts with request.max_tokens, which also limits the output; "
            'keep one of them (endpoint.max_tokens_field = "max_completion_tokens" sends max_tokens under that name)'
        )
    for name in request.from_columns.keys() - FROM_COLUMNS:
        yield f"request.from_columns.{name}: expected one of {', '.join(sorted(FROM_COLUMNS))}"
    if job.endpoint.dialect == "responses":
        for name in sorted(request.extra.keys() & CHAT_ONLY):
            yield f"request.extra.{name}: the Responses API has no such field; leave it out"
    if job.tiers.fallback is not None and request.service_tier is None:
        yield 'tiers.fallback: needs request.service_tier, the tier that comes first, for example "flex"'
    yield from _json_problems(request)
    yield from _schema_problems(request)
    if unknown := re.search(r"\{(?!(?:job|date)\})[^}]*\}", job.output.path):
        yield f"output.path: {unknown[0]} is unknown; {{job}} and {{date}} are allowed"
    if job.output.partition_by and job.output.layout == "parts":
        yield "output.partition_by: writes one file for each partition; leave out output.layout"
    if job.output.dataset is not None and not job.output.partition_by:
        yield "output.dataset: takes partitions; name the columns in output.partition_by"
    scheme, is_url, _ = (job.output.dataset or "").partition("://")
    if is_url and scheme.lower() not in REPLACE_IN_ONE_STEP:
        yield (
            f"output.dataset: a partition can't be replaced in one step at {scheme}://; "
            "name a local directory, s3:// or gs://"
        )
    if job.output.format != "parquet" and (job.output.partition_by or job.output.layout == "parts"):
        other = "partition_by" if job.output.partition_by else "layout"
        yield f"output.format: JSON lines are one file; leave out output.{other}, or write Parquet"
    if job.input.partitions and job.input.path == "-":
        yield "input.partitions: standard input has no folders; leave it out, or name a directory"
    if isinstance(most := job.input.max_changed, str) and not re.fullmatch(r"(\d{1,2}(\.\d+)?|100)%", most):
        yield f'input.max_changed: expected a number of rows, or a share of them such as "5%" (is {most!r})'
    for name, cap in job.budget.caps_usd.items():
        if not (cap.is_finite() and 0 < cap <= MAX_COST_USD):
            yield f"budget.{name}: expected 0 to {MAX_COST_USD:,} USD (is {cap})"
    most_usd = job.canary.max_cost_per_row_usd
    if most_usd is not None and not (most_usd.is_finite() and 0 < most_usd <= MAX_COST_USD):
        yield f"canary.max_cost_per_row_usd: expected 0 to {MAX_COST_USD:,} USD (is {most_usd})"
    try:
        ZoneInfo(job.budget.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        yield f"budget.time_zone: no time zone {job.budget.time_zone!r} is known here; expected one like Europe/Berlin"
    for model, price in job.pricing.items():
        prices: dict[str, Decimal | None] = {
            name: getattr(price, name) for name in Price.__struct_fields__ if name != "tiers"
        }
        for tier, of_tier in price.tiers.items():
            prices |= {f"tiers.{tier}.{name}": getattr(of_tier, name) for name in of_tier.__struct_fields__}
        for name, usd in prices.items():
            if usd is not None and not (usd.is_finite() and 0 <= usd <= MAX_PRICE_USD):
                yield f"pricing.{model}.{name}: expected 0 to {MAX_PRICE_USD:,} USD per million tokens (is {usd})"


_POOL_ONLY = ("weight", "requests_per_minute", "tokens_per_minute", "max_in_flight")
_SAME = ("dialect", "max_tokens_field", "developer_role")
"""Settings that decide what is sent: the same request goes to any endpoint."""


def _single_problems(endpoint: Endpoint) -> Iterator[str]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(Endpoint)}
    for name in _POOL_ONLY:
        if getattr(endpoint, name) != defaults[name]:
            instead = "has no meaning for a single endpoint" if name == "weight" else f"set limits.{name} instead"
            yield f"endpoint.{name}: is for several [[endpoint]] tables; {instead}"


def _pool_problems(job: Job) -> Iterator[str]:
    for name in Limits.__struct_fields__:
        if "_per_" in name and getattr(job.limits, name) is not None:
            yield f"limits.{name}: with several [[endpoint]] tables, set the limits of each in its table"
    names = {each.name for each in job.endpoints if each.name is not None}
    if len(names) > 1:
        yield f"endpoint.name: several endpoints share one name ({' and '.join(sorted(names))} differ); use label"
    for place, each in enumerate(job.endpoints):
        if each.url == SIMULATOR:
            yield f'endpoint[{place}].url: "simulator" can be the only endpoint; give the URL of batchrun simulate'
        for name in _SAME:
            if getattr(each, name) != getattr(job.endpoint, name):
                yield f"endpoint[{place}].{name}: must be the same in every [[endpoint]] table"


def _schema_problems(request: RequestTemplate) -> Iterator[str]:
    """Answers are validated against the job's schemas, so the schemas must be valid."""
    schemas = {f"request.functions[{i}].parameters": each.parameters for i, each in enumerate(request.functions or ())}
    if request.response_format is not None:
        schemas["request.response_format.schema"] = request.response_format.schema
    tools = answer_schema.tool_schemas(request.extra.get("tools"))
    schemas |= {f"request.extra.{place}": schema for place, schema in tools.items()}
    for path, schema in schemas.items():
        if schema is not None and (problem := answer_schema.problem(schema)) is not None:
            yield f"{path}: {problem}"


def _json_problems(request: RequestTemplate) -> Iterator[str]:
    """JSON has no dates, nan or inf. The encoder would send texts and nulls in their place."""
    values = msgspec.to_builtins(request, builtin_types=(datetime, date, time))
    for path, value in flatten(values, "request").items():
        if msgspec.json.decode(msgspec.json.encode(value)) != value:
            yield f"{path}: JSON has no such value (is {value}); write dates in quotes"


def _is_http_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unmatched brackets, or an invalid port
        return False


def _endpoint_problems(endpoint: Endpoint) -> Iterator[str]:
    if endpoint.url == SIMULATOR:
        return
    if not _is_http_url(endpoint.url):
        yield f'endpoint.url: expected an http(s) URL or "simulator" (is {endpoint.url!r})'
        return
    parts = urlsplit(endpoint.url)
    for dialect, path in PATHS.items():
        if dialect != endpoint.dialect and parts.path.rstrip("/").endswith(path):
            yield f'endpoint.dialect: "{endpoint.dialect}" is not served at {path}; set it to "{dialect}"'
    if parts.username or parts.password or "key=" in parts.query:
        yield "endpoint.url: holds a secret; use endpoint.api_key_env"
    if endpoint.api_key_env and endpoint.api_key_file:
        yield "endpoint.api_key_file: conflicts with endpoint.api_key_env; keep one of them"
    given = endpoint.api_key_env or endpoint.api_key_file
    if given and endpoint.auth == "none":
        yield 'endpoint.auth: "none" conflicts with a key; keep one of them'
    if not given and not endpoint.headers and endpoint.auth != "none":
        yield (
            "endpoint.api_key_env: name the environment variable that holds the key (or api_key_file); "
            'or set endpoint.auth = "none" for a server without keys'
        )
    if endpoint.proxy is not None and "@" in endpoint.proxy:
        yield "endpoint.proxy: holds a secret; use a proxy that needs no password, such as a local one that adds it"
    elif endpoint.proxy is not None and not _is_http_url(endpoint.proxy):
        yield f"endpoint.proxy: expected the http(s) URL of an HTTP proxy (is {endpoint.proxy!r})"
    keyless = endpoint.auth == "none" and not any(value.startswith("env:") for value in endpoint.headers.values())
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not keyless:
        yield f"endpoint.url: the key would travel unencrypted to {parts.hostname}; use https://"
    taken = {name.lower() for name in (*endpoint.headers, "Authorization", "Content-Type", "Content-Length", "Host")}
    if endpoint.request_id_header is not None and endpoint.request_id_header.lower() in taken:
        yield f"endpoint.request_id_header: {endpoint.request_id_header} is already in use"
    for name, value in endpoint.headers.items():
        if SECRET.search(name) and not value.startswith("env:"):
            yield f'endpoint.headers.{name}: a job file must not hold a secret; write "env:NAME"'
