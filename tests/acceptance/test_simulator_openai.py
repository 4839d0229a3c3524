"""The official `openai` client uses the simulator unchanged, and reads of a stream what batchrun's reads."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import openai
import pytest
from openai.types import CompletionUsage

from batchrun.credentials import Credentials
from batchrun.job.settings import Endpoint
from batchrun.records import Answer, FunctionCall, Usage
from batchrun.response import answer as answers
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.transport.transport import choose, opened
from tests.pictures import OF_TYPE, data_url
from tests.simulator_process import RunningSimulator, running_simulator

SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": ["good", "bad"]}, "score": {"type": "integer"}},
    "required": ["label", "score"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(api_key="sk-right", models=("vtrix-x",))) as running:
        yield running


@pytest.fixture
def client(simulator: RunningSimulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=simulator.url, api_key="sk-right", max_retries=0) as connected:
        yield connected


def test_a_completion_is_billed_on_the_ledger(client: openai.OpenAI, simulator: RunningSimulator) -> None:
    made = client.chat.completions.with_raw_response.create(
        model="vtrix-x",
        messages=[{"role": "user", "content": "Hello"}],
        reasoning_effort="low",
        extra_headers={"X-Client-Request-Id": "run-0-1"},
    )
    completion = made.parse()
    line = simulator.ledger()[-1]
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content
    assert completion.usage is not None
    assert completion.usage.completion_tokens_details is not None
    assert (line.client_request_id, line.request_id) == ("run-0-1", made.headers["x-request-id"])
    assert (line.status, line.billed, line.prompt_tokens) == (200, True, completion.usage.prompt_tokens)
    assert line.completion_tokens == completion.usage.completion_tokens
    assert line.reasoning_tokens == completion.usage.completion_tokens_details.reasoning_tokens


def test_a_stream_equals_the_plain_answer(client: openai.OpenAI) -> None:
    """It carries usage when the request wants it."""
    plain = client.chat.completions.create(model="vtrix-x", messages=[{"role": "user", "content": "Hi"}])
    chunks = list(
        client.chat.completions.create(
            model="vtrix-x",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == plain.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert (chunks[-1].choices, chunks[-1].usage) == ([], plain.usage)


def test_a_stream_states_usage_only_on_request(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="vtrix-x", messages=[{"role": "user", "content": "Hi"}], stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in stream)


def test_a_function_is_called_plain_and_streamed(client: openai.OpenAI) -> None:
    plain = client.chat.completions.create(
        model="vtrix-x",
        messages=[{"role": "user", "content": "Hi"}],
        functions=[{"name": "rate", "parameters": SCHEMA}],
        function_call={"name": "rate"},
    )
    call = plain.choices[0].message.function_call
    assert call is not None
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    stream = client.chat.completions.create(
        model="vtrix-x",
        messages=[{"role": "user", "content": "Hi"}],
        functions=[{"name": "rate", "parameters": SCHEMA}],
        function_call={"name": "rate"},
        stream=True,
    )
    deltas = [chunk.choices[0].delta.function_call for chunk in stream]
    assert deltas[0] is not None
    assert deltas[0].name == "rate"
    assert "".join(delta.arguments or "" for delta in deltas if delta) == call.arguments


def test_a_json_schema_is_answered(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(
        model="vtrix-x",
        messages=[{"role": "user", "content": "Label this"}],
        response_format={"type": "json_schema", "json_schema": {"name": "label", "schema": SCHEMA, "strict": True}},
    )
    jsonschema.validate(json.loads(completion.choices[0].message.content or ""), SCHEMA)


def test_wrong_keys_and_models_are_refused(client: openai.OpenAI) -> None:
    """401 for the key, 404 for the model."""
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.with_options(api_key="sk-wrong").chat.completions.create(
            model="vtrix-x", messages=[{"role": "user", "content": "Hi"}]
        )
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="vtrix-y", messages=[{"role": "user", "content": "Hi"}])


def test_an_invalid_field_is_400_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="vtrix-x", messages=[{"role": "user", "content": "Hi"}], temperature=2.5)
    assert caught.value.param == "temperature"


def test_the_client_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["vtrix-x"]


def test_a_429_says_how_long_to_wait() -> None:
    with (
        running_simulator(SimulatorConfig(requests_per_minute=1)) as simulator,
        openai.OpenAI(base_url=simulator.url, api_key="any", max_retries=0) as client,
    ):
        first = client.chat.completions.with_raw_response.create(
            model="vtrix-x", messages=[{"role": "user", "content": "Hi"}]
        )
        assert first.headers["x-ratelimit-limit-requests"] == "1"
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="vtrix-x", messages=[{"role": "user", "content": "Hi"}])
        assert 50 <= int(caught.value.response.headers["retry-after"]) <= 60
        assert 50_000 <= int(caught.value.response.headers["retry-after-ms"]) <= 60_000
        assert [(line.status, line.billed) for line in simulator.ledger()] == [(200, True), (429, False)]


# -- batchrun's own transport, beside it


def ours(simulator: RunningSimulator, **fields: Any) -> Answer:
    """What batchrun's transport makes of the same request, streamed."""
    requested = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    url = f"{simulator.url}/chat/completions"

    async def main() -> Answer:
        credentials = Credentials({"Authorization": "Bearer sk-right"}, frozenset({"sk-right"}))
        endpoint = Endpoint(url, api_key_env="KEY")
        async with opened(choose(endpoint), url, endpoint, credentials) as transport:
            attempt = await transport.send(json.dumps(requested).encode(), "x")
            assert attempt.error is None
            assert attempt.streamed
            assert attempt.time_to_first_token_s is not None
            return answers.parse(attempt.body)

    return asyncio.run(main())


def theirs(client: openai.OpenAI, **fields: Any) -> Answer:
    """What the official client's chunks add up to."""
    requested: Any = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}], "stream": True, **fields}
    chunks = list(client.chat.completions.create(**requested))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    contents = [delta.content for delta in deltas if delta.content is not None]
    calls = [delta.function_call for delta in deltas if delta.function_call is not None]
    called = FunctionCall("".join(c.name or "" for c in calls), "".join(c.arguments or "" for c in calls))
    (finish_reason,) = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason is not None]
    return Answer(
        completion=True,
        completion_id=chunks[0].id,
        created=chunks[0].created,
        model=chunks[0].model,
        content="".join(contents) if contents else None,
        function_call=called if calls else None,
        finish_reason=finish_reason,
        usage=next((_usage(chunk.usage) for chunk in chunks if chunk.usage is not None), None),
    )


def _usage(usage: CompletionUsage) -> Usage:
    cached, thought = usage.prompt_tokens_details, usage.completion_tokens_details
    assert cached is not None
    assert thought is not None
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    return Usage(*counts, cached.cached_tokens, thought.reasoning_tokens)


WITH_IMAGE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Caption it."},
            {"type": "image_url", "image_url": {"url": data_url(OF_TYPE["image/png"]), "detail": "low"}},
        ],
    }
]


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="no usage"),
        pytest.param({"stream_options": {"include_usage": True}}, id="usage"),
        pytest.param({"stream_options": {"include_usage": True}, "reasoning_effort": "xhigh"}, id="reasoning"),
        pytest.param({"stream_options": {"include_usage": True}, "max_tokens": 3}, id="cut short"),
        pytest.param(
            {
                "functions": [{"name": "rate", "parameters": SCHEMA}],
                "function_call": {"name": "rate"},
                "stream_options": {"include_usage": True},
            },
            id="function",
        ),
        pytest.param(
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "label", "schema": SCHEMA, "strict": True},
                }
            },
            id="schema",
        ),
        pytest.param(
            {"response_format": {"type": "json_object"}, "stream_options": {"include_usage": True}}, id="JSON"
        ),
        pytest.param({"messages": WITH_IMAGE, "stream_options": {"include_usage": True}}, id="an image"),
    ],
)
def test_a_stream_says_the_same_to_both_clients(
    client: openai.OpenAI, simulator: RunningSimulator, fields: dict[str, Any]
) -> None:
    our, their = ours(simulator, **fields), theirs(client, **fields)
    own = {"completion_id": their.completion_id, "created": their.created}
    assert msgspec.structs.replace(our, **own) == their
    assert (our.completion_id, our.created) != (None, None)


TOOLS: Any = [
    {"type": "function", "function": {"name": "label", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "label"}}])
def test_both_clients_read_tool_calls_alike(client: openai.OpenAI, simulator: RunningSimulator, choice: Any) -> None:
    requested: Any = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    plain = client.chat.completions.create(**requested, tool_choice=choice)
    (call,) = plain.choices[0].message.tool_calls or []
    assert plain.choices[0].finish_reason == "tool_calls"
    assert call.type == "function"
    if choice != "required":
        assert call.function.name == "label"
    if call.function.name == "label":
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    streamed = ours(simulator, tools=TOOLS, tool_choice=choice)
    assert json.loads(streamed.tool_calls or "") == [call.model_dump(exclude_none=True)]
    assert streamed.finish_reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_tool_round_trip_works(client: openai.OpenAI, stream: bool) -> None:
    requested: Any = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
    plain = client.chat.completions.create(**requested, tool_choice="required")
    message = plain.choices[0].message
    (call,) = message.tool_calls or []
    for said in (message, message.model_dump(), message.model_dump(exclude_none=True) | {"content": None}):
        result = {"role": "tool", "tool_call_id": call.id, "content": '{"sun": true}'}
        again: Any = {**requested, "messages": [*requested["messages"], said, result], "stream": stream}
        reported = client.chat.completions.create(**again)
        last = list(reported)[-1].choices[0] if stream else reported.choices[0]
        assert last.finish_reason == "stop"


def test_a_tool_choice_that_leads_nowhere_is_refused(client: openai.OpenAI) -> None:
    requested: Any = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}]}
    nowhere: Any = {"type": "function", "function": {"name": "none"}}
    for fields in ({"tools": TOOLS, "tool_choice": nowhere}, {"tool_choice": "required"}, {"tools": TOOLS * 2}):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**requested, **fields)


def test_several_choices_are_read_alike(client: openai.OpenAI, simulator: RunningSimulator) -> None:
    requested: Any = {"model": "vtrix-x", "messages": [{"role": "user", "content": "Hi"}], "n": 3}
    plain = client.chat.completions.create(**requested)
    said = [(choice.index, choice.message.content, choice.finish_reason) for choice in plain.choices]
    assert len({content for _, content, _ in said}) == 3
    streamed = ours(simulator, n=3)
    assert [(choice.index, choice.content, choice.finish_reason) for choice in streamed.choices] == said
    assert streamed.content == plain.choices[0].message.content


def test_the_client_reads_tiers_and_cached_tokens() -> None:
    """And the refusal of a tier that is full."""
    config = SimulatorConfig(faults=parse_faults("flex_unavailable=1"), cache_life_s=60)
    messages: Any = [{"role": "user", "content": "word " * 1_000}]
    with (
        running_simulator(config) as simulator,
        openai.OpenAI(base_url=simulator.url, api_key="sk-any", max_retries=0) as client,
    ):
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="m", messages=messages, service_tier="flex")
        served = [
            client.chat.completions.create(
                model="m", messages=messages, service_tier="auto", prompt_cache_key=key, max_tokens=5
            )
            for key in ("a", "a", "b")
        ]
    assert caught.value.code == "resource_unavailable"
    assert [completion.service_tier for completion in served] == ["default"] * 3
    cached = []
    for completion in served:
        assert completion.usage is not None
        assert completion.usage.prompt_tokens_details is not None
        cached.append(completion.usage.prompt_tokens_details.cached_tokens)
    assert cached == [0, 1_152, 0]
