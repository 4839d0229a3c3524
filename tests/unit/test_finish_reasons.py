"""What a finish_reason means that no table has: its parts say it, and it is still reported."""

import json

import pytest

from batchrun.report.notices import unknown_reason
from batchrun.response.answer import parse
from batchrun.response.finish_reasons import Meaning, is_known, meaning_of

GUESSED: dict[Meaning, str] = {
    Meaning.FAILURE: """
        engine_error model_error generation_error ERROR_INTERNAL connection_error deadline_exceeded oom gpu_oom killed
        server_shutdown rate_limited backend_error decode_error failed_generation failed_precondition evicted internal
        context_canceled context_deadline_exceeded request_timeout EngineError max_retries_exceeded invalid_output
        quota_exceeded usage_quota upstream_disconnect worker-crashed generation.failed
    """,
    Meaning.FILTER: """
        policy_violation safety_violation flagged moderation_block policy censored harmful inappropriate
        blocked_by_filter prompt_blocked safety_error content_safety SafetyViolation incomplete_content_filter
        moderation_check_failed guard_triggered
    """,
    Meaning.LENGTH: """
        context_overflow context_window_exceeded truncation length_exceeded cutoff max_steps token_budget out_of_tokens
        incomplete:max_output_tokens context_length_error max_context_exceeded output_limit_reached too_long
    """,
    Meaning.OTHER: """
        no_error not_filtered load default harmony_end user_halt budget unknown quux skill_done not_set stop_now
        FINISH_REASON_UNSPECIFIED
    """,
}


@pytest.mark.parametrize(("word", "meaning"), [(word, m) for m, words in GUESSED.items() for word in words.split()])
def test_an_unknown_reason_is_judged_by_parts(word: str, meaning: Meaning) -> None:
    assert meaning_of(word) is meaning
    assert not is_known(word), "and it is reported"


@pytest.mark.parametrize("word", ["repetition", "repetition_detected", "repeat"])
def test_a_model_stopped_in_a_loop_is_truncated(word: str) -> None:
    """vLLM and Moonshot end an answer that repeats itself."""
    assert meaning_of(word) is Meaning.LENGTH
    assert is_known(word)


def test_a_reason_may_be_an_object() -> None:
    """SGLang's older servers send the reason with what matched, whole and streamed."""
    reason = {"type": "length", "length": 16}
    choice = {"index": 0, "finish_reason": reason}
    whole = {"choices": [{**choice, "message": {"role": "assistant", "content": "cut"}}]}
    piece = {"choices": [{**choice, "delta": {"content": "cut"}}]}
    for raw in (json.dumps(whole).encode(), f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n".encode()):
        answer = parse(raw)
        assert (answer.completion, answer.content, answer.finish_reason) == (True, "cut", "length")


@pytest.mark.parametrize("word", ["stop", "MAX_TOKENS", "content_filter_error", "error_limit", "null", "", None])
def test_the_table_of_reasons_comes_first(word: str | None) -> None:
    assert is_known(word)


def test_a_long_text_is_no_reason() -> None:
    assert meaning_of("error " * 50) is Meaning.OTHER


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("quux", "finish.other decides"),
        ("engine_error", "takes for a failure by its words: they are retried"),
        ("policy_violation", "finish.content_filter decides"),
        ("context_overflow", "finish.length decides"),
    ],
)
def test_the_report_says_what_it_was_taken_for(word: str, said: str) -> None:
    assert said in unknown_reason(word)
