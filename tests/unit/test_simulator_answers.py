"""What the simulated model says: plausible, billed, and a function of the question."""

import json
from typing import Any

import jsonschema
import pytest

from batchrun.simulator.answers import Answer, FunctionCall, answer_to, latency_s, spoiled
from batchrun.simulator.refusal import Refused
from batchrun.simulator.tokens import text_tokens
from batchrun.simulator.validate import Question, parse_question

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "minLength": 2}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
}
FUNCTIONS = [{"name": "weather", "parameters": PARAMETERS}, {"name": "time"}]


def _question(text: str = "Hello", **fields: Any) -> Question:
    return parse_question({"model": "vtrix-x", "messages": [{"role": "user", "content": text}], **fields})


def _answers(count: int = 60, **fields: Any) -> list[Answer]:
    return [answer_to(_question(f"Question {number}", **fields), seed=0) for number in range(count)]


def test_equal_questions_have_equal_answers() -> None:
    assert answer_to(_question(), seed=1) == answer_to(_question(stream=True), seed=1)
    assert answer_to(_question(), seed=1) != answer_to(_question(), seed=2)
    assert len({answer.choices[0].content for answer in _answers()}) == 60


def test_an_answer_ends_at_max_tokens() -> None:
    for answer in _answers(max_tokens=5):
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 5)
    for answer in _answers(max_tokens=500):
        choice = answer.choices[0]
        assert choice.finish_reason == "stop"
        assert answer.usage.completion_tokens == text_tokens(choice.content or "")


def test_more_effort_means_more_reasoning() -> None:
    means = []
    for effort in ("low", "medium", "high", "xhigh"):
        usages = [answer.usage for answer in _answers(reasoning_effort=effort)]
        assert all(0 < usage.reasoning_tokens < usage.completion_tokens for usage in usages)
        means.append(sum(usage.reasoning_tokens for usage in usages))
    assert means == sorted(means)
    assert all(answer.usage.reasoning_tokens == 0 for answer in _answers())


def test_thinking_leaves_room_for_the_answer() -> None:
    (answer,) = _answers(1, reasoning_effort="xhigh", max_tokens=10)
    assert (answer.usage.reasoning_tokens, answer.usage.completion_tokens) == (5, 10)
    assert answer.choices[0].content


def test_only_a_long_system_prompt_is_cached() -> None:
    def usage_of(role: str, length: int) -> Any:
        messages = [{"role": role, "content": "word " * length}, {"role": "user", "content": "Hello"}]
        return answer_to(parse_question({"model": "vtrix-x", "messages": messages}), seed=0).usage

    assert usage_of("system", 100).cached_tokens == 0
    assert usage_of("user", 2_000).cached_tokens == 0
    cached = usage_of("system", 2_000)
    assert 2_300 < cached.cached_tokens < cached.prompt_tokens
    assert cached.cached_tokens % 128 == 0


def test_a_prompt_counts_all_its_content() -> None:
    def prompt(**fields: Any) -> int:
        return answer_to(_question(**fields), seed=0).usage.prompt_tokens

    image = {"type": "image_url", "image_url": {"url": "https://example.com/a.png", "detail": "low"}}
    assert prompt(text="x" * 400) == prompt(text="") + 100
    assert prompt(messages=[{"role": "user", "content": [image]}]) == prompt(text="") + 85
    assert prompt(functions=FUNCTIONS) > prompt() + 20
    schema = {"type": "json_schema", "json_schema": {"name": "p", "schema": PARAMETERS}}
    assert prompt(response_format=schema) > prompt() + 20


def test_a_named_function_is_called_with_fitting_arguments() -> None:
    for answer in _answers(functions=FUNCTIONS, function_call={"name": "weather"}):
        choice = answer.choices[0]
        assert choice.function_call is not None
        assert (choice.content, choice.finish_reason) == (None, "function_call")
        assert choice.function_call.name == "weather"
        jsonschema.validate(json.loads(choice.function_call.arguments), PARAMETERS)


def test_a_call_without_parameters_works() -> None:
    (answer,) = _answers(1, functions=FUNCTIONS, function_call={"name": "time"})
    assert answer.choices[0].function_call == FunctionCall("time", "{}")


def test_auto_calls_sometimes_none_never() -> None:
    free = [answer.choices[0].function_call is not None for answer in _answers(functions=FUNCTIONS)]
    assert 10 < sum(free) < 50
    silent = _answers(functions=FUNCTIONS, function_call="none")
    assert all(answer.choices[0].function_call is None for answer in silent)


def test_requested_json_fits_its_schema() -> None:
    for answer in _answers(response_format={"type": "json_object"}):
        assert isinstance(json.loads(answer.choices[0].content or ""), dict)
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PARAMETERS}}
    for answer in _answers(response_format=form):
        jsonschema.validate(json.loads(answer.choices[0].content or ""), PARAMETERS)


def test_each_requested_choice_is_billed() -> None:
    (answer,) = _answers(1, n=3)
    assert len({choice.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == sum(choice.completion_tokens for choice in answer.choices)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    with pytest.raises(Refused) as caught:
        answer_to(_question("x" * 1_700_000), seed=0)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_latency_is_random_per_question() -> None:
    delays = sorted(latency_s(_question(str(n)), 0, median_s=2.0, sigma=0.5) for n in range(500))
    assert 1.7 < delays[250] < 2.3
    assert delays[12] < 1.0 < 4.0 < delays[-12]
    assert latency_s(_question(), 0, median_s=2.0, sigma=0.5) == latency_s(_question(), 0, median_s=2.0, sigma=0.5)
    assert latency_s(_question(), 0, median_s=0.0, sigma=0.5) == 0.0


# -- tools, and answers that were spoiled

TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]


def test_a_tool_is_called_as_tool_choice_says() -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for answer in _answers(20, tools=TOOLS, tool_choice=named):
        (choice,) = answer.choices
        assert choice.tool_call is not None
        assert (choice.tool_call.name, choice.finish_reason, choice.content) == ("weather", "tool_calls", None)
        jsonschema.validate(json.loads(choice.tool_call.arguments), PARAMETERS)
    required = [answer.choices[0].tool_call for answer in _answers(tools=TOOLS, tool_choice="required")]
    assert {call.name for call in required if call is not None} == {"weather", "time"}
    assert None not in required
    free = [answer.choices[0].tool_call is not None for answer in _answers(tools=TOOLS)]
    assert 10 < sum(free) < 50
    assert not any(answer.choices[0].tool_call for answer in _answers(tools=TOOLS, tool_choice="none"))


def test_a_spoiled_answer_is_invalid_json() -> None:
    requested = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS}}
    for fields in ({"response_format": requested}, {"functions": FUNCTIONS[:1], "function_call": {"name": "weather"}}):
        (answer,) = _answers(1, **fields)
        for kind, loads in (("invalid_json", False), ("unfit_json", True)):
            (choice,) = spoiled(answer, kind).choices  # type: ignore[arg-type]
            text = choice.function_call.arguments if choice.function_call else choice.content or ""
            if loads:
                assert isinstance(json.loads(text), str)
            else:
                with pytest.raises(json.JSONDecodeError):
                    json.loads(text)
