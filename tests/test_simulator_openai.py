"""The official `openai` client uses the simulator unchanged."""

import json
from collections.abc import Iterator

import jsonschema
import openai
import pytest

from batchrun.simulator import SimulatorConfig
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


def test_a_plain_completion_is_on_the_ledger_as_it_was_billed(
    client: openai.OpenAI, simulator: RunningSimulator
) -> None:
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


def test_a_stream_adds_up_to_the_plain_answer_and_carries_usage_when_asked(client: openai.OpenAI) -> None:
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


def test_a_stream_is_silent_about_usage_unless_asked(client: openai.OpenAI) -> None:
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


def test_a_wrong_key_is_401_and_an_unknown_model_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        client.with_options(api_key="sk-wrong").chat.completions.create(
            model="vtrix-x", messages=[{"role": "user", "content": "Hi"}]
        )
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="vtrix-y", messages=[{"role": "user", "content": "Hi"}])


def test_a_field_out_of_range_is_400_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="vtrix-x", messages=[{"role": "user", "content": "Hi"}], temperature=2.5)
    assert caught.value.param == "temperature"


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["vtrix-x"]


def test_too_many_requests_are_429_with_the_time_to_wait() -> None:
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
