"""A job file as one frozen `Job`: its tables of `settings`, and what follows from several of them.

`load` reads one from a TOML file.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, get_args
from urllib.parse import urlsplit

import msgspec

from batchrun.job.settings import (
    PATHS,
    About,
    Budget,
    Canary,
    Endpoint,
    Engine,
    Finish,
    Input,
    Limits,
    Output,
    Positive,
    Price,
    RequestTemplate,
    Retry,
    Simulator,
    Storage,
    Table,
    Telemetry,
    Text,
    Tiers,
)

SIMULATOR = "simulator"


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A job: its requests, endpoints and limits. Holds no secret. `name` is the job file's stem."""

    endpoint: Endpoint
    request: RequestTemplate = RequestTemplate()
    tiers: Tiers = Tiers()
    name: Text = "job"
    job: About = About()
    input: Input = Input()
    limits: Limits = Limits()
    engine: Engine = Engine()
    retry: Retry = Retry()
    finish: Finish = Finish()
    budget: Budget = Budget()
    canary: Canary = Canary()
    output: Output = Output()
    storage: Storage = Storage()
    pricing: dict[str, Price] = {}
    telemetry: Telemetry = Telemetry()
    simulator: Simulator = Simulator()
    on_end: list[Text] = []
    on_end_timeout_s: Positive = 60.0
    more_endpoints: list[Endpoint] = []  # all `[[endpoint]]` tables but the first

    @property
    def endpoints(self) -> list[Endpoint]:
        """Every endpoint of the job, in the job file's order."""
        return [self.endpoint, *self.more_endpoints]

    @property
    def labels(self) -> list[str]:
        """The unique name of each endpoint in messages: its label, else its key's variable or file, else its host."""
        labels: list[str] = []
        for each in self.endpoints:
            file = None if each.api_key_file is None else PurePath(each.api_key_file).name
            label = each.label or each.api_key_env or file or urlsplit(each.url).netloc or each.url
            same = sum(known.partition(" #")[0] == label for known in labels)
            labels.append(f"{label} #{same + 1}" if same else label)
        return labels

    def limits_of(self, endpoint: Endpoint) -> Limits:
        """The limits of one of several endpoints."""
        return msgspec.structs.replace(
            self.limits,
            requests_per_minute=endpoint.requests_per_minute,
            tokens_per_minute=endpoint.tokens_per_minute,
            max_in_flight=endpoint.max_in_flight or self.limits.max_in_flight,
        )

    @property
    def total_limits(self) -> Limits:
        """The limits of all endpoints together. A rate that one of them does not limit is not limited."""
        if not self.more_endpoints:
            return self.limits
        each = [self.limits_of(endpoint) for endpoint in self.endpoints]
        rpm, tpm = [one.requests_per_minute for one in each], [one.tokens_per_minute for one in each]
        return msgspec.structs.replace(
            self.limits,
            requests_per_minute=None if None in rpm else sum(filter(None, rpm)),
            tokens_per_minute=None if None in tpm else sum(filter(None, tpm)),
            max_in_flight=sum(one.max_in_flight for one in each),
        )

    def on(self, date: str) -> "Job":
        """The job with its input of that logical date (`2026-11-28`), where `input.path` or a value of
        `input.partitions` holds `{date}`.
        """

        def dated(value: Any) -> Any:
            if isinstance(value, list):
                return [dated(each) for each in value]
            return value.replace("{date}", date) if isinstance(value, str) else value

        partitions = {name: dated(value) for name, value in self.input.partitions.items()}
        given = msgspec.structs.replace(self.input, path=dated(self.input.path), partitions=partitions)
        return self if given == self.input else msgspec.structs.replace(self, input=given)

    @property
    def simulated(self) -> bool:
        """True if the job uses the built-in simulator."""
        return self.endpoint.url == SIMULATOR

    @property
    def url(self) -> str:
        """The whole URL of the first endpoint."""
        return self.endpoint.full_url

    @property
    def endpoint_name(self) -> str:
        """The name of the endpoint, a part of every request_key. Two URLs of one server may share a name."""
        # several endpoints have one name, since any of them may answer: the one that is set, else that of the first URL
        if (name := next((each.name for each in self.endpoints if each.name is not None), None)) is not None:
            return name
        if self.simulated:
            return SIMULATOR
        parts = urlsplit(self.url)
        return (
            f"{parts.scheme}://{parts.netloc}{self.endpoint.base_path}{PATHS['chat']}"  # one question in either dialect
        )

    @property
    def service_tiers(self) -> tuple[str | None, ...]:
        """The tiers that a request of the job may be sent to; (None,): it names none."""
        fallback = self.tiers.fallback
        return (self.request.service_tier,) if fallback is None else (self.request.service_tier, fallback)

    def question(self) -> dict[str, Any]:
        """The settings that decide what a request asks, as plain values by path. A change here means other answers."""
        settings = flatten(msgspec.to_builtins(self.request, str_keys=True), "request")
        settings["endpoint.name"] = self.endpoint_name
        settings["input.dialect"] = self.input.dialect
        return {path: value for path, value in settings.items() if not path.startswith(_WIRE_ONLY)}

    def fingerprint(self) -> str:
        """The digest of `question()`. Jobs with equal fingerprints send equal requests for equal rows."""
        return hashlib.blake2b(msgspec.json.encode(self.question(), order="sorted"), digest_size=16).hexdigest()


def all_settings() -> Iterator[tuple[str, object]]:
    """Every setting a job file can hold, as (path, default); `msgspec.NODEFAULT` where one is required."""
    for table in msgspec.structs.fields(Job):
        if table.name == "more_endpoints":
            continue  # the settings of `endpoint` again
        structs = [t for t in (table.type, *get_args(table.type)) if isinstance(t, type)]
        inner = next((t for t in structs if issubclass(t, Table)), None)
        if inner is None:
            yield table.name, table.default_factory() if table.default_factory is list else table.default
            continue
        path = f"{table.name}.MODEL" if inner is Price else table.name
        for field in msgspec.structs.fields(inner):
            default = field.default_factory() if field.default_factory in (dict, list) else field.default
            yield f"{path}.{field.name}", default


_WIRE_ONLY = (
    *("request.stream", "request.extra.stream_options"),
    *("request.service_tier", "request.cache_prefix", "request.extra.prompt_cache_key"),
)  # change how a request is served and its answer is sent, not the question


def flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Nested tables as one level of dotted paths; lists and empty tables are kept as values."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, dict) and value:
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat
