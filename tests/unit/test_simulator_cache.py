"""The simulated prompt cache: what a machine has processed is cached there, for a while, and nowhere else."""

from random import Random
from typing import Any

from batchrun.simulator.prompt_cache import PromptCache, prompt_of
from batchrun.simulator.validate import ChatRequest, parse_question

SHARED = "Label the review by the rules below. " * 120  # 4,440 bytes: 1,110 tokens


def _request(system: str = SHARED, user: str = "Good.", **fields: Any) -> ChatRequest:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return parse_question({"model": "m", "messages": messages, **fields}).request


def _send(cache: PromptCache, request: ChatRequest, now_s: float) -> int:
    """The cached tokens of a request that is answered at once."""
    prompt = prompt_of(request)
    machine = cache.machine(prompt, now_s)
    cached = cache.look_up(prompt, machine, now_s)
    cache.keep(prompt, machine, now_s)
    return cached


def test_a_second_request_finds_the_firsts_prefix() -> None:
    cache = PromptCache(300, 0)
    assert _send(cache, _request(user="Good."), 0) == 0
    assert _send(cache, _request(user="Bad."), 1) == 1_024
    assert _send(cache, _request(SHARED[::-1]), 2) == 0


def test_prefixes_grow_in_steps_of_128_tokens() -> None:
    cache = PromptCache(300, 0)
    long = SHARED * 2
    _send(cache, _request(long), 0)
    cached = _send(cache, _request(long, "Another."), 1)
    assert cached % 128 == 0
    assert 2_048 < cached <= len(long) / 4


def test_a_short_prompt_is_never_cached() -> None:
    cache = PromptCache(300, 0)
    assert [_send(cache, _request(SHARED[:3_000]), now_s) for now_s in (0, 1)] == [0, 0]


def test_a_prefix_in_use_lives_on() -> None:
    cache = PromptCache(300, 0)
    assert [_send(cache, _request(), now_s) for now_s in (0, 200, 400, 701)] == [0, 1_024, 1_024, 0]


def test_two_requests_at_once_both_miss() -> None:
    cache = PromptCache(300, 0)
    prompt = prompt_of(_request())
    machine = cache.machine(prompt, 0)
    assert [cache.look_up(prompt, machine, 0) for _ in range(2)] == [0, 0]


def test_row_data_first_spoils_every_prefix() -> None:
    cache = PromptCache(300, 0)
    rng = Random(0)
    assert not any(_send(cache, _request(f"Row {rng.random()}: {SHARED}"), now_s) for now_s in range(10))


def test_keys_keep_busy_prefixes_warm() -> None:
    def misses(keys: int) -> int:
        cache = PromptCache(300, 0)
        fields = [{"prompt_cache_key": f"k{key}"} for key in range(keys)]
        return sum(not _send(cache, _request(**fields[row % keys]), row / 10) for row in range(600))  # 600 a minute

    assert misses(1) > 300
    assert 30 < misses(40) <= 40  # one for each key; two keys may share a machine
