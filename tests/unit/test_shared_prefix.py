"""What rows have in common is measured, where it stands first and where it does not."""

import json

import pytest

from batchrun.records import Request
from batchrun.request.shared_prefix import Group, SharedText, SharedTextSurvey, group_of

RULES = " ".join(f"Rule {number}: a review that speaks of part {number} has label {number}." for number in range(120))


def _body(*contents: str) -> bytes:
    messages = [{"role": "system" if place == 0 else "user", "content": text} for place, text in enumerate(contents)]
    return json.dumps({"model": "m", "messages": messages, "max_tokens": 5}, separators=(",", ":")).encode()


def _survey(bodies: list[bytes]) -> SharedText:
    survey = SharedTextSurvey()
    for body in bodies:
        survey.add(Request(0, b"", body, "m", 0, 0))
    return survey.result()


def test_a_shared_system_prompt_is_one_group() -> None:
    found = _survey([_body(RULES, f"Review {row}: fine.") for row in range(50)])
    (group,) = found.groups
    assert group.rows == 50
    assert group.common.endswith(b"Review ")
    assert group.tokens % 128 == 0
    assert 0.2 * len(RULES) < group.tokens <= 0.26 * len(RULES)
    assert found.behind_bytes == 0


def test_each_system_prompt_is_a_group() -> None:
    found = _survey([_body(f"Customer {row % 3}. {RULES}", f"Review {row}.") for row in range(30)])
    assert [group.rows for group in found.groups] == [10, 10, 10]


@pytest.mark.parametrize(
    "contents", [("Review {row}. " + RULES,), ("Row {row}.", RULES), (RULES[:900], "{row}. " + RULES)]
)
def test_row_data_before_shared_text_is_noticed(contents: tuple[str, ...]) -> None:
    found = _survey([_body(*(text.replace("{row}", str(row)) for text in contents)) for row in range(50)])
    assert found.groups == ()
    assert found.behind_bytes > 0.9 * len(RULES)
    assert found.behind.startswith("Rule 0")


def test_short_or_different_prompts_have_nothing_to_share() -> None:
    for bodies in (
        [_body("Label it.", f"Review {row}.") for row in range(50)],
        [_body(f"{row} " * 2_000) for row in range(1_000)],
    ):
        found = _survey(bodies)
        assert (found.rows, found.groups, found.behind_bytes) == (len(bodies), (), 0)


def test_one_row_shares_with_no_one() -> None:
    assert _survey([_body(RULES, "Fine.")]) == SharedText(1, len(_body(RULES, "Fine.")), ())


def test_a_prefix_with_images_has_no_group() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": RULES}]
    body = json.dumps({"messages": [{"role": "user", "content": parts}]}, separators=(",", ":")).encode()
    assert group_of(body) is None


def test_a_beginning_below_1024_tokens_is_worth_nothing() -> None:
    assert Group("m", b"x" * 4_000).tokens == 0
    assert Group("m", b"x" * 4_600).tokens == 1_024
