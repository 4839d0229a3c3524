"""The simulated model's answer: a pure function of the question and the seed, never of the attempt."""

import math
from hashlib import blake2b
from random import Random
from typing import Literal

import msgspec
from msgspec import UNSET

from batchrun.simulator.instances import WORDS, instance
from batchrun.simulator.refusal import Refused
from batchrun.simulator.tokens import BYTES_PER_TOKEN, cached_tokens, prompt_tokens, text_tokens
from batchrun.simulator.validate import (
    CONTEXT_TOKENS,
    ChatRequest,
    Function,
    JSONObjectFormat,
    JSONSchemaFormat,
    NamedFunction,
    NamedTool,
    Question,
)

_WORDS_PER_ANSWER = (8, 40)  # one to three sentences
_REASONING_TOKENS = {"low": 32, "medium": 128, "high": 512, "xhigh": 2_048}  # the mean for each effort
_CALLS_WHEN_FREE = 0.5  # the share of answers that call a function under `auto`


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str
    """A JSON object as text; cut short where the answer reaches its token limit."""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0


class Choice(msgspec.Struct, frozen=True):
    """Content, a function call or a tool call."""

    content: str | None
    function_call: FunctionCall | None
    finish_reason: Literal["stop", "length", "function_call", "tool_calls"]
    completion_tokens: int
    reasoning_tokens: int
    tool_call: FunctionCall | None = None


class Answer(msgspec.Struct, frozen=True):
    choices: tuple[Choice, ...]
    usage: Usage


def answer_to(question: Question, seed: int) -> Answer:
    """The answer and its billed usage.

    Raises:
        Refused: 400; the prompt is longer than the context, or a schema can't be answered.
    """
    request = question.request
    prompt = prompt_tokens(request)
    if prompt > CONTEXT_TOKENS:
        message = f"This model's maximum context length is {CONTEXT_TOKENS} tokens; the messages have {prompt}."
        raise Refused(400, message, code="context_length_exceeded", param="messages")
    choices = tuple(_choice(request, _random(question, seed, index)) for index in range(request.n))
    usage = Usage(
        prompt_tokens=prompt,
        cached_tokens=cached_tokens(request),
        completion_tokens=sum(choice.completion_tokens for choice in choices),
        reasoning_tokens=sum(choice.reasoning_tokens for choice in choices),
    )
    return Answer(choices, usage)


def latency_s(question: Question, seed: int, *, median_s: float, sigma: float) -> float:
    """Seconds to the first byte, log-normal around the median; the same for the same question."""
    return median_s * math.exp(_random(question, seed, -1).gauss(0, sigma)) if median_s else 0.0


def _random(question: Question, seed: int, purpose: int) -> Random:
    salt = seed.to_bytes(8) + purpose.to_bytes(4, signed=True)
    return Random(int.from_bytes(blake2b(question.digest, key=salt, digest_size=8).digest()))


def _choice(request: ChatRequest, rng: Random) -> Choice:
    limit = request.output_limit()
    reasoning = 0
    if isinstance(request.reasoning_effort, str):
        wanted = round(_REASONING_TOKENS[request.reasoning_effort] * rng.uniform(0.5, 1.5))
        reasoning = min(wanted, limit // 2)  # some of the limit stays for the text
    function, tool = _called(request, rng)
    called = function or tool
    whole = _text(request, called, rng)
    text = whole.encode()[: (limit - reasoning) * BYTES_PER_TOKEN].decode(errors="ignore")
    usual: Literal["stop", "function_call", "tool_calls"] = "function_call" if function else "stop"
    return Choice(
        content=None if called else text,
        function_call=FunctionCall(function.name, text) if function else None,
        finish_reason="length" if text != whole else "tool_calls" if tool else usual,
        completion_tokens=reasoning + text_tokens(text),
        reasoning_tokens=reasoning,
        tool_call=FunctionCall(tool.name, text) if tool else None,
    )


def spoiled(answer: Answer, kind: Literal["invalid_json", "unfit_json"]) -> Answer:
    """The answer with texts that are not JSON, or that are JSON of another shape: a string that holds the text."""

    def spoil(text: str) -> str:
        return f"Here it is: {text}" if kind == "invalid_json" else msgspec.json.encode(text).decode()

    def spoil_call(call: FunctionCall | None) -> FunctionCall | None:
        return None if call is None else FunctionCall(call.name, spoil(call.arguments))

    choices = tuple(
        msgspec.structs.replace(
            choice,
            content=None if choice.content is None else spoil(choice.content),
            function_call=spoil_call(choice.function_call),
            tool_call=spoil_call(choice.tool_call),
        )
        for choice in answer.choices
    )
    return msgspec.structs.replace(answer, choices=choices)


def _called(request: ChatRequest, rng: Random) -> tuple[Function | None, Function | None]:
    """The function to call, and the tool: the named one, any of them under `required`, and under `auto` any or none.

    A function goes before a tool, so that an answer has one call at most.
    """
    # Under `auto` the model never calls after a result, so that a client's round trip ends.
    may_call = request.messages[-1].role not in ("tool", "function")
    if isinstance(request.function_call, NamedFunction):
        name = request.function_call.name
        return next(function for function in request.functions if function.name == name), None
    if request.functions and request.function_call == "auto" and rng.random() < _CALLS_WHEN_FREE and may_call:
        return rng.choice(request.functions), None
    tools = [tool.function for tool in request.tools]
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        return None, next(function for function in tools if function.name == name)
    is_free = request.tool_choice in (UNSET, "auto") and bool(tools) and rng.random() < _CALLS_WHEN_FREE and may_call
    return None, rng.choice(tools) if is_free or request.tool_choice == "required" else None


def _text(request: ChatRequest, called: Function | None, rng: Random) -> str:
    """The content, or the arguments of a call."""
    if called is not None:
        if called.parameters is UNSET or not called.parameters:
            return "{}"
        assert isinstance(called.parameters, dict)
        if called in request.functions:
            param = f"functions[{request.functions.index(called)}].parameters"
        else:
            param = f"tools[{[tool.function for tool in request.tools].index(called)}].function.parameters"
        return msgspec.json.encode(instance(called.parameters, rng, param)).decode()

    if isinstance(request.response_format, JSONSchemaFormat):
        schema = request.response_format.json_schema.schema
        return msgspec.json.encode(instance(schema, rng, "response_format.json_schema.schema")).decode()
    prose = " ".join(rng.choices(WORDS, k=rng.randint(*_WORDS_PER_ANSWER))).capitalize() + "."
    if isinstance(request.response_format, JSONObjectFormat):
        return msgspec.json.encode({"answer": prose, "confidence": round(rng.random(), 2)}).decode()
    return prose
