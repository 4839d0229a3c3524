"""How large requests are is learned from the answers' own usage, and handed to the next start."""

import random
from datetime import UTC, datetime

import pytest

from batchrun.limits import daily, token_estimates
from batchrun.limits.daily import Day
from batchrun.limits.token_estimates import Estimates, Sizes, TokenEstimates
from batchrun.records import Request, Usage


def request(size: int = 1_000, *, model: str = "m", image_tokens: int = 0, max_tokens: int = 100_000) -> Request:
    return Request(0, b"", b"x" * size, model, 200_000, max_tokens, image_tokens=image_tokens)


def usage(prompt: int, completion: int) -> Usage:
    return Usage(prompt, completion, prompt + completion)


def test_first_estimates_come_from_bytes() -> None:
    """A prompt has three tenths of its bytes as tokens, an answer a thousand at most."""
    assert Estimates({}).of(request()) == (300, 1_000)
    assert Estimates({}).of(request(max_tokens=40)) == (300, 40)
    assert Estimates({}).of(request(image_tokens=1_600)) == (300 + 1_600, 1_000)


@pytest.mark.parametrize("per_byte", [0.08, 0.25, 1.2])
def test_estimates_follow_a_change_of_language(per_byte: float) -> None:
    estimates = Estimates({})
    estimates.learn(request(1_000), usage(int(1_000 * per_byte), 10))
    assert estimates.of(request(2_000))[0] == pytest.approx(2_000 * per_byte, rel=0.01)
    for _ in range(300):
        estimates.learn(request(1_000), usage(500, 10))
    assert estimates.of(request(2_000))[0] == pytest.approx(1_000, rel=0.1)


def test_nine_in_ten_answers_stay_below() -> None:
    rng = random.Random(1)
    estimates = Estimates({})
    lengths = [rng.randint(1, 1_000) for _ in range(400)]
    for length in lengths:
        estimates.learn(request(), usage(250, length))
    _, output = estimates.of(request())
    assert sum(length <= output for length in lengths) == pytest.approx(360, abs=20)
    assert estimates.of(request(max_tokens=100))[1] == 100


def test_images_do_not_spoil_the_text_ratio() -> None:
    estimates = Estimates({})
    for _ in range(50):
        estimates.learn(request(1_000), usage(250, 10))
        estimates.learn(request(1_000, image_tokens=1_600), usage(250 + 170, 10))
    assert estimates.of(request(1_000))[0] == pytest.approx(250, abs=2)
    assert estimates.of(request(1_000, image_tokens=800))[0] == pytest.approx(250 + 85, abs=5)


def test_each_models_sizes_are_separate() -> None:
    estimates = Estimates({})
    estimates.learn(request(model="a"), usage(100, 10))
    estimates.learn(request(model="b"), usage(0, 0))
    assert estimates.of(request(model="a")) == (100, 10)
    assert estimates.of(request(model="b")) == (300, 1_000)


def test_learned_entries_of_other_versions_are_ignored() -> None:
    known = TokenEstimates({"m": Sizes(0.2, 0.1, 40.0)}, 3_000.0, None, 32)
    assert token_estimates.decode(token_estimates.encode(known)) == known
    for entry in (None, "", "[]", '{"sizes": 3}', "nonsense"):
        assert token_estimates.decode(entry) == TokenEstimates()
    assert Estimates(known.sizes).of(request()) == (200, 40)
    assert Estimates(known.sizes).sizes() == known.sizes


def test_daily_counts_restart_at_midnight_utc() -> None:
    evening = datetime(2026, 11, 25, 23, 59, 30, tzinfo=UTC)
    first = daily.today(None, evening, requests=0)
    assert daily.today(daily.encode(first), evening, requests=700) == first == Day("2026-11-25", 0)
    assert daily.left_s(evening) == 30.0
    after = datetime(2026, 11, 26, 0, 0, 1, tzinfo=UTC)
    assert daily.today(daily.encode(first), after, requests=800) == Day("2026-11-26", 800)
