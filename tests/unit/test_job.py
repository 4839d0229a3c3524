"""A job's mistakes name their path, and its fingerprint changes exactly with what decides the questions."""

import json
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchrun.errors import JobError
from batchrun.job.job import Job, all_settings
from batchrun.job.load import from_tables, load

ROOT = Path(__file__).parents[2]
SIMULATOR = '[endpoint]\nurl = "simulator"\n'


def read(tmp_path: Path, toml: str, *overrides: str) -> Job:
    file = tmp_path / "night.toml"
    file.write_text(toml, "utf-8")
    return load(file, overrides)


def problem_of(tmp_path: Path, toml: str, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        read(tmp_path, toml, *overrides)
    return str(caught.value).removeprefix(f"{tmp_path / 'night.toml'}: ")


def at(url: str, **endpoint: object) -> Job:
    return from_tables({"endpoint": {"url": url, "api_key_env": "KEY", **endpoint}})


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda file: file.name)
def test_every_job_that_is_shipped_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert load(file).name == file.stem


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        (
            "[limits]\nrequest_per_minute = 1",
            "limits.request_per_minute: unknown setting: did you mean limits.requests_per_minute?",
        ),
        ("[limits]\nrpm = 1", "limits.rpm: unknown setting: did you mean limits.requests_per_minute?"),
        ("[limits]\nmax_in_flight = [1]", "limits.max_in_flight: expected an integer, got a list"),
        ("[limit]\nmax_in_flight = 1", "limit: unknown setting: did you mean limits?"),
        ("[limits]\nmax_cost_usd = 1", "limits.max_cost_usd: unknown setting: did you mean budget.max_cost_usd?"),
        ("[xyzzy]", "xyzzy: unknown setting: docs/job.md lists every setting"),
        (
            '[[request.messages]]\nroll = "user"',
            "request.messages[0].roll: unknown setting: did you mean request.messages[0].role?",
        ),
        (
            '[[request.messages]]\nrole = "usr"\ncontent = "x"',
            'request.messages[0].role: expected "assistant" or "developer" or "system" or "user" (is \'usr\')',
        ),
        (
            '[request]\nfunctions = [{nam = "f"}]',
            "request.functions[0].nam: unknown setting: did you mean request.functions[0].name?",
        ),
        ("[request]\nmax_tokens = 0", "request.max_tokens: expected an integer >= 1 (is 0)"),
        ("[request]\nmax_tokens = 128_001", "request.max_tokens: expected an integer <= 128000 (is 128001)"),
        ("[request]\nmax_tokens = 1.5", "request.max_tokens: expected an integer (is 1.5)"),
        ("[request]\ntemperature = nan", "request.temperature: expected a number >= 0.0 (is nan)"),
        ("[request]\ntemperature = true", "request.temperature: expected a number (is True)"),
        (
            '[request]\nreasoning_effort = "huge"',
            'request.reasoning_effort: expected "high" or "low" or "medium" or "xhigh" (is \'huge\')',
        ),
        ('[request]\nfunction_call = "always"', 'request.function_call: expected "none", "auto" or { name = "…" }'),
        (
            '[request]\nprompt = "x"\nmessages = "chat"',
            "request.prompt: conflicts with request.messages; keep one of them",
        ),
        (
            '[request]\nsystem = "x"\n[[request.messages]]\nrole = "user"\ncontent = "x"',
            "request.system: put it into request.messages as a message with role = 'system'",
        ),
        (
            '[request]\nresponse_format = { type = "json_schema" }',
            "request.response_format: a json_schema needs one of `file` or `schema`",
        ),
        (
            '[request]\nresponse_format = { type = "yaml" }',
            'request.response_format.type: expected "json_object" or "json_schema" or "text" (is \'yaml\')',
        ),
        (
            "[request]\nextra = { stream = true }",
            "request.extra.stream: has its own setting, request.stream",
        ),
        (
            "[request]\nextra = { until = 2026-11-22 }",
            "request.extra.until: JSON has no such value (is 2026-11-22); write dates in quotes",
        ),
        (
            "[request]\nextra = { bias = { a = nan } }",
            "request.extra.bias.a: JSON has no such value (is nan); write dates in quotes",
        ),
        (
            '[request]\nfrom_columns = { seed = "s" }',
            "request.from_columns.seed: expected one of max_tokens, model, reasoning_effort, temperature, top_p",
        ),
        (
            '[request]\nfrom_columns = { model = "m", top_p = 1 }',
            "request.from_columns.top_p: expected text (is 1)",
        ),
        ("[limits]\nmax_in_flight = true", "limits.max_in_flight: expected an integer (is True)"),
        (
            "[limits]\nrequests_per_minute = inf",
            "limits.requests_per_minute: expected a number <= 1000000000000.0 (is inf)",
        ),
        ("[budget]\nmax_cost_usd = 0", "budget.max_cost_usd: expected 0 to 10,000,000 USD (is 0)"),
        ("[budget]\nmax_cost_usd = nan", "budget.max_cost_usd: expected 0 to 10,000,000 USD (is NaN)"),
        ("[budget]\nmax_cost_usd = inf", "budget.max_cost_usd: expected 0 to 10,000,000 USD (is Infinity)"),
        ('[budget]\nmax_cost_usd = "ten"', "budget.max_cost_usd: expected an amount in USD (is 'ten')"),
        (
            "[pricing.m]\ninput = 1",
            "pricing.m.output: is missing; batchrun new FILE writes a complete job file",
        ),
        (
            '[pricing.a]\ninput = 1\noutput = 2\n[pricing."b.c"]\ninput = "x"\noutput = 1',
            "pricing.b.c.input: expected an amount in USD (is 'x')",
        ),
        (
            "[pricing.m]\ninput = 1\noutput = 1\ncache_input = 1",
            "pricing.m.cache_input: unknown setting: did you mean pricing.m.cached_input?",
        ),
        (
            "[pricing.m]\ninput = nan\noutput = 1",
            "pricing.m.input: expected 0 to 100,000 USD per million tokens (is NaN)",
        ),
        (
            "[pricing.m]\ninput = 1\noutput = 1\ncached_input = -1",
            "pricing.m.cached_input: expected 0 to 100,000 USD per million tokens (is -1)",
        ),
        ('[output]\nlayout = "csv"', 'output.layout: expected "file" or "parts" (is \'csv\')'),
        ("name = 3", "endpoint.name: expected text (is 3)"),
        *(
            (f'[{table}]\n{name} = "a\\u0000b"', f"{table}.{name}: holds a NUL, which no name, path or address may")
            for table, name in (("output", "path"), ("budget", "state"), ("telemetry", "prometheus_dir"))
        ),
        ("[simulator]\nlatency = 1", "simulator.latency: unknown setting: did you mean simulator.latency_s?"),
    ],
)
def test_a_mistake_names_path_and_suggestion(tmp_path: Path, toml: str, problem: str) -> None:
    assert problem_of(tmp_path, f"{SIMULATOR}{toml}") == problem


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "..", "a//b", "a/"])
def test_a_name_leads_out_of_no_folder(tmp_path: Path, name: str) -> None:
    assert problem_of(tmp_path, f'name = "{name}"\n{SIMULATOR}').startswith("name: is a folder in output.path")


@pytest.mark.parametrize(
    ("toml", "problem"),
    [("", "endpoint: is missing; batchrun new FILE writes a complete job"), ("a = ", "not valid TOML")],
)
def test_a_file_that_is_no_job_is_named(tmp_path: Path, toml: str, problem: str) -> None:
    assert problem_of(tmp_path, toml).startswith(problem)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"gone\.toml: can't read the job file: No such file"):
        load(tmp_path / "gone.toml")


@pytest.mark.parametrize(
    ("path", "default"), list(all_settings()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_setting_refuses_other_types(path: str, default: object) -> None:
    *tables, name = path.replace("MODEL", "m").split(".")
    wrong: Any = {"endpoint": {"url": "simulator"}}
    place = wrong
    for table in tables:
        place = place.setdefault(table, {})
    if tables == ["pricing", "m"]:
        place.update(input=1, output=1)
    place[name] = [[]]  # no setting is a list of lists
    with pytest.raises(JobError) as caught:
        from_tables(wrong)
    assert str(caught.value).startswith(".".join([*tables, name]))


# -- --set


def test_an_override_is_laid_over_the_file(tmp_path: Path) -> None:
    job = read(
        tmp_path,
        SIMULATOR,
        "limits.max_in_flight=3",
        "request.prompt=Say {{ text }} = it",
        "budget.max_cost_usd=0.1",
        'pricing."gpt-5.3".input=1.75',
        'pricing."gpt-5.3".output=14',
        "request.extra={seed=7}",
    )
    assert (job.limits.max_in_flight, job.request.prompt) == (3, "Say {{ text }} = it")
    assert job.budget.max_cost_usd == Decimal("0.1")
    assert job.pricing["gpt-5.3"].input == Decimal("1.75")
    assert job.request.extra == {"seed": 7}


@pytest.mark.parametrize(
    "path",
    [
        "endpoint.api_key",
        "endpoint.headers.Authorization",
        "endpoint.headers.X-Api-Key",
        'endpoint.headers."X-Api-Key"',
        "endpoint.headers.token ",
        "endpoint.headers.client_secret",
        "endpoint.password",
        "endpoint.headers.x.y-secret",
    ],
)
def test_an_override_never_repeats_a_secret(tmp_path: Path, path: str) -> None:
    problem = problem_of(tmp_path, SIMULATOR, f"{path}=canary-4711")
    assert "a secret does not belong on a command line" in problem
    assert "canary" not in problem


def test_an_override_can_name_a_secret(tmp_path: Path) -> None:
    assert read(tmp_path, SIMULATOR, "endpoint.api_key_env=OTHER").endpoint.api_key_env == "OTHER"


@pytest.mark.parametrize("override", ["limits", "=3", "a b=3", "name.x=3", ""])
def test_an_invalid_override_is_refused(tmp_path: Path, override: str) -> None:
    assert problem_of(tmp_path, f'name = "n"\n{SIMULATOR}', override).startswith("--set ")


# -- endpoint


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("https://h/llm/chat/completions", "https://h/llm/chat/completions"),
        ("https://h/llm/chat/completions/", "https://h/llm/chat/completions"),
        ("https://h/v1", "https://h/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h", "https://h/chat/completions"),
        ("https://h/v1?api-version=2026-01-01", "https://h/v1/chat/completions?api-version=2026-01-01"),
        ("https://h/chat/completions?a=1", "https://h/chat/completions?a=1"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080/v1/chat/completions"),
        ("http://[::1]:8080", "http://[::1]:8080/chat/completions"),
        ("http://localhost", "http://localhost/chat/completions"),
    ],
)
def test_a_base_url_gets_the_route_appended(url: str, whole: str) -> None:
    assert at(url).url == whole


@pytest.mark.parametrize("request_", [{"max_tokens": 5}, {"from_columns": {"max_tokens": "limit"}}])
def test_a_second_limit_of_output_is_a_mistake(request_: dict[str, Any]) -> None:
    tables = {"endpoint": {"url": "simulator"}, "request": {**request_, "extra": {"max_completion_tokens": 5}}}
    with pytest.raises(JobError, match=r"request\.extra\.max_completion_tokens: conflicts with request\.max_tokens"):
        from_tables(tables)
    assert from_tables({**tables, "request": {"extra": {"max_completion_tokens": 5}}})


@pytest.mark.parametrize("path", ["request.temperature", "request.extra.seed", "request.response_format", "budget.x"])
def test_an_empty_override_removes_the_setting(path: str, tmp_path: Path) -> None:
    job = tmp_path / "night.toml"
    job.write_text(
        'endpoint.url = "simulator"\n[request]\nmodel = "m"\ntemperature = 0.5\n'
        'extra = { seed = 1, n = 2 }\nresponse_format = { type = "json_object" }\n'
    )
    before, after = load(job), load(job, [f"{path}="])
    assert (after == before) == (path == "budget.x")
    assert after.request.temperature == (None if path == "request.temperature" else 0.5)
    assert after.request.extra == ({"n": 2} if path == "request.extra.seed" else {"seed": 1, "n": 2})


def test_a_proxy_with_a_password_is_refused() -> None:
    with pytest.raises(JobError, match=r"endpoint\.proxy: holds a secret"):
        at("https://h", proxy="http://user:word@proxy:3128")


@pytest.mark.parametrize("proxy", ["proxy.local:3128", "notaurl", "socks5://127.0.0.1:1080", "http://", "http://p:x"])
def test_an_unusable_proxy_is_refused(proxy: str) -> None:
    with pytest.raises(JobError, match=r"endpoint\.proxy: expected the http\(s\) URL of an HTTP proxy"):
        at("https://h", proxy=proxy)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://example.com/v1", "unencrypted to example.com; use https"),
        ("http://127.0.0.1.example.com", "unencrypted"),
        ("http://localhost@example.com", "holds a secret"),
        ("https://user:word@h", "holds a secret"),
        ("https://h?key=abc", "holds a secret"),
        ("ftp://h", "expected an http"),
        ("h/v1", "expected an http"),
        ("https:///v1", "expected an http"),
        ("http://[::1", "expected an http"),
        ("https://h:99999", "expected an http"),
        ("https://h:port", "expected an http"),
    ],
)
def test_an_unsafe_url_is_refused(url: str, problem: str) -> None:
    with pytest.raises(JobError, match=problem) as caught:
        at(url)
    assert str(caught.value).startswith("endpoint.url: ")


def test_a_job_names_one_place_for_its_key() -> None:
    with pytest.raises(JobError, match=r"endpoint\.api_key_file: conflicts with"):
        at("https://h", api_key_file="k")
    with pytest.raises(JobError, match=r"endpoint\.api_key_env: name the environment variable"):
        at("https://h", api_key_env=None)
    with pytest.raises(JobError, match=r'endpoint\.auth: "none" conflicts with a key'):
        at("https://h", auth="none")


def test_keys_require_https_beyond_loopback() -> None:
    keyless = {"api_key_env": None, "auth": "none"}
    for url in ("http://127.0.0.1:8080/v1", "http://gpu-box:8000/v1", "https://h"):
        assert at(url, **keyless).url.startswith(url)
    assert at("http://gpu-box:8000/v1", headers={"X-Team": "night"}, **keyless).endpoint.headers
    with pytest.raises(JobError, match="unencrypted to gpu-box"):
        at("http://gpu-box:8000/v1", headers={"X-Pass": "env:PASS"}, **keyless)


def test_a_job_file_holds_no_secret() -> None:
    with pytest.raises(JobError, match=r"endpoint\.headers\.X-Api-Key: a job file must not hold a secret") as caught:
        at("https://h", headers={"X-Api-Key": "canary-4711"})
    assert "canary" not in str(caught.value)
    assert at("https://h", headers={"X-Api-Key": "env:OTHER"}).endpoint.headers == {"X-Api-Key": "env:OTHER"}


def test_the_endpoint_name_defaults_to_the_url() -> None:
    assert at("https://h/v1?api-version=1").endpoint_name == "https://h/v1/chat/completions"
    assert at("https://h/v1", name="ours").endpoint_name == "ours"
    assert from_tables({"endpoint": {"url": "simulator"}}).endpoint_name == "simulator"


# -- schema file


def with_schema(file: Path) -> Mapping[str, Any]:
    response_format = {"type": "json_schema", "name": "label", "file": str(file)}
    return {"endpoint": {"url": "simulator"}, "request": {"response_format": response_format}}


def test_a_schema_file_belongs_to_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "label.schema.json"
    file.write_text(json.dumps({"type": "object"}))
    job = from_tables(with_schema(file))
    assert job.request.response_format is not None
    assert (job.request.response_format.schema, job.request.response_format.file) == ({"type": "object"}, None)
    (tmp_path / "moved.json").write_text(json.dumps({"type": "object"}))
    assert from_tables(with_schema(tmp_path / "moved.json")).fingerprint() == job.fingerprint()
    file.write_text(json.dumps({"type": "array"}))
    assert from_tables(with_schema(file)).fingerprint() != job.fingerprint()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "can't read"),
        ("{", "is not JSON"),
        ("[]", "does not hold a JSON object"),
        ("\udcff", "is not JSON"),
        ('{"type": "strin"}', r"s\.json: invalid JSON schema: at \$\.type: "),
        ('{"$ref": "https://example.com/s"}', r"s\.json: invalid JSON schema: .*https://example\.com/s"),
    ],
)
def test_an_invalid_schema_file_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "s.json"
    if text is not None:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(JobError, match=problem) as caught:
        from_tables(with_schema(file))
    assert str(caught.value).startswith("request.response_format.file: ")


def test_an_invalid_inline_schema_is_named(tmp_path: Path) -> None:
    bad = {"properties": {"a": {"type": "strin"}}}
    requested = {"response_format": {"type": "json_schema", "schema": bad}}
    functions = {"functions": [{"name": "f"}, {"name": "g", "parameters": bad}]}
    for request, path in ((requested, "response_format.schema"), (functions, "functions[1].parameters")):
        with pytest.raises(JobError) as caught:
            from_tables({"endpoint": {"url": "simulator"}, "request": request})
        assert str(caught.value).startswith(f"request.{path}: invalid JSON schema: at $.properties.a.type: ")


# -- fingerprint

OTHER_VALUES: Mapping[str, object] = {
    "limits.limits_are": "per_process",
    "engine.name": "ray",
    "endpoint.proxy": "http://proxy:3128",
    "endpoint.url": "https://other/v1",
    "endpoint.name": "other",
    "endpoint.api_key_env": "OTHER",
    "endpoint.headers": {"X-Team": "a"},
    "request.model": "m2",
    "request.system": "Be brief.",
    "request.prompt": "{{ other }}",
    "request.messages": "chat",
    "request.images": ["photo"],
    "endpoint.auth": "none",
    "input.reuse_status": ["ok"],
    "input.max_changed": "5%",
    "input.partitions": {"lang": "de"},
    "endpoint.max_tokens_field": "max_completion_tokens",
    "endpoint.developer_role": "system",
    "endpoint.transport": "session",
    "endpoint.max_in_flight": 3,
    "endpoint.dialect": "responses",
    "request.image_detail": "low",
    "request.reasoning_effort": "low",
    "request.functions": [{"name": "f", "parameters": {"type": "object"}}],
    "request.function_call": "none",
    "request.response_format": {"type": "json_object"},
    "request.extra": {"seed": 1},
    "request.from_columns": {"model": "m"},
    "input.dialect": "messages",
    "job.tags": {"team": "search"},
    **dict.fromkeys(("finish.stop", "finish.length", "finish.function_call", "finish.content_filter"), "retry"),
    **dict.fromkeys(("finish.empty", "finish.other", "finish.refusal"), "retry"),
    "output.columns": ["a"],
    "output.raw": "always",
    "output.layout": "parts",
    "output.format": "jsonl",
    "output.partition_by": ["lang"],
    "output.dataset": "labels",
    "output.compression": "gzip",
    "on_end": ["true"],
    "canary.min_ok_share": 0.5,
    "canary.max_invalid_share": 0.5,
    "budget.time_zone": "Europe/Berlin",
    "pricing.MODEL.tiers": {"flex": {"input": 1, "output": 2}},
}
"""Values that differ from the default where one more, or one more letter, would not be allowed."""

ALONE = {
    "request.messages": "request.prompt",
    "endpoint.api_key_file": "endpoint.api_key_env",
    "endpoint.auth": "endpoint.api_key_env",
}
"""Settings that conflict with another."""

OF_SEVERAL_ENDPOINTS = {
    f"endpoint.{name}" for name in ("weight", "requests_per_minute", "tokens_per_minute", "max_in_flight")
}
HOW_IT_IS_SERVED = {"request.stream", "request.service_tier", "request.cache_prefix"}

DECIDE_THE_QUESTIONS = {"endpoint.url", "endpoint.name", "input.dialect"} | {
    path for path, _ in all_settings() if path.startswith("request.") and path not in HOW_IT_IS_SERVED
}


def another_value(path: str, default: object) -> object:
    if path in OTHER_VALUES:
        return OTHER_VALUES[path]
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return default + 1
    if isinstance(default, str):
        return f"{default}x"
    numbers = (
        "requests_per_second",
        "requests_per_minute",
        "requests_per_day",
        "tokens_per_minute",
        "max_tokens",
        "temperature",
        "top_p",
        "_usd",
        "max_requests",
        "canary.rows",
        "flex_latency_s",
        "cache_life_s",
        "max_actors",
    )
    return 1 if path.endswith(numbers) else "x"


@pytest.mark.parametrize(
    ("path", "default"), list(all_settings()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_fingerprint_covers_exactly_the_question(path: str, default: object) -> None:
    tables: Any = {
        "name": "night",
        "endpoint": {"url": "https://h/v1", "api_key_env": "KEY", "headers": {"X-Team": "b"}},
        "request": {"model": "m", "prompt": "{{ text }}", "images": ["front"], "service_tier": "flex"},
        "pricing": {"MODEL": {"input": 1, "output": 2}},
    }
    before = from_tables(tables)
    changed = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    if path in ALONE:
        table, _, name = ALONE[path].partition(".")
        del changed[table][name]
        before = from_tables(changed)
    *parents, last = path.split(".")
    place = changed
    for parent in parents:
        place[parent] = dict(place.get(parent, {}))
        place = place[parent]
    price = {"flex": {"input": 1, "output": 1}} if last == "tiers" else 3
    if path == "output.dataset":
        place["partition_by"] = ["lang"]
    place[last] = price if parents[:1] == ["pricing"] else another_value(path, default)
    if path in OF_SEVERAL_ENDPOINTS:
        before = from_tables({**tables, "endpoint": [tables["endpoint"], tables["endpoint"]]})
        changed["endpoint"] = [tables["endpoint"], changed["endpoint"]]
    after = from_tables(changed)
    assert after != before
    assert (after.fingerprint() != before.fingerprint()) == (path in DECIDE_THE_QUESTIONS)


def test_transport_settings_are_no_question() -> None:
    plain = from_tables({"endpoint": {"url": "simulator"}})
    streamed = from_tables(
        {
            "endpoint": {"url": "simulator"},
            "request": {"stream": True, "extra": {"stream_options": {"include_usage": False}}},
        }
    )
    assert streamed.fingerprint() == plain.fingerprint()


def test_an_empty_body_table_is_kept() -> None:
    plain = from_tables({"endpoint": {"url": "simulator"}})
    empty = from_tables({"endpoint": {"url": "simulator"}, "request": {"extra": {"logit_bias": {}}}})
    assert empty.fingerprint() != plain.fingerprint()


def test_decimals_are_exact_only_in_prices(tmp_path: Path) -> None:
    job = read(tmp_path, f"{SIMULATOR}[request]\nextra = {{ a = 0.1 }}\n[budget]\nmax_cost_usd = 25.10")
    assert job.budget.max_cost_usd == Decimal("25.10")
    assert msgspec.json.encode(job.request.extra) == b'{"a":0.1}'


@pytest.mark.parametrize("override", ["limits.rpm=4", "limits.max_in_flight=many", "limits={rpm=4}", "limit.x.y=1"])
def test_an_override_mistake_names_the_override(tmp_path: Path, override: str) -> None:
    file = tmp_path / "night.toml"
    assert problem_of(tmp_path, SIMULATOR, override).startswith(f"{file}, overridden by --set or an option: limit")
    assert problem_of(tmp_path, "[limits]\nrpm = 4", "limits.max_in_flight=4").startswith("limits.rpm: ")
