"""The meaning of a finish_reason, in any vendor's words. PURE: one table; unknown words are judged by their parts.

The API has four (docs/api.md, "Response"). The others are what vendors and servers send in the same place; docs/api.md,
"Finish reasons", has their sources. Upper case, hyphens and prefixes such as `FINISH_REASON_` make no difference.
"""

import re
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache

from batchrun.patterns import Pattern


class Meaning(StrEnum):
    """Meaning of a finish_reason for its answer; `[finish]` has a setting for each but FAILURE, which is retried."""

    STOP = "stop"
    """The model came to its end."""
    LENGTH = "length"
    """Cut short: a limit of tokens, of the context or of time."""
    FUNCTION_CALL = "function_call"
    TOOL_CALLS = "tool_calls"
    """The same as FUNCTION_CALL, with calls of tools."""
    FILTER = "content_filter"
    """The server blocked the rest, or all of it."""
    REFUSAL = "refusal"
    """The model itself declined."""
    FAILURE = "failure"
    """The server broke off, or the model's output was unusable: the text so far is not an answer."""
    OTHER = "other"
    """Unknown, or missing."""


NO_REASON = frozenset({None, "", "null", "none", "None"})
"""Values that servers send without a reason; Qwen's say "null"."""


_NAMES: Mapping[Meaning, str] = {
    Meaning.STOP: """
        stop stopped stop_sequence stop_sequences stop_token stop_str stop_string stop_criteria_met
        stop_sequence_reached stop_trigger eog_token eot eot_id eom_id im_end end_of_message
        end eos eos_token eos_token_id end_turn end_of_turn end_of_text endoftext end_of_sequence complete completed
        completion finish finished done normal success model_end
    """,
    Meaning.LENGTH: """
        length limit length_limit max_tokens max_token max_length max_len maximum_tokens maximum_length max_output
        max_output_tokens max_new_tokens max_completion_tokens token_limit token_limit_reached tokens_limit output_limit
        model_length context context_length context_limit context_window context_length_exceeded max_context
        model_context_window_exceeded max_model_len truncated incomplete time_limit error_limit length_capped pause_turn
        repetition repetition_detected repeat
    """,
    Meaning.FUNCTION_CALL: "function_call function_calls function",
    Meaning.TOOL_CALLS: "tool_calls tool_call tool_use tools",
    Meaning.FILTER: """
        content_filter content_filtered content_filter_error filter filtered safety image_safety recitation
        image_recitation blocklist prohibited_content image_prohibited_content spii language model_armor sensitive
        content_policy content_policy_violation content_moderation moderation moderated blocked block guardrail
        guardrails guardrail_intervened jailbreak error_toxic toxic risk risk_control data_inspection_failed unsafe
    """,
    Meaning.REFUSAL: "refusal refused refuse",
    Meaning.FAILURE: """
        error errored failed failure abort aborted cancel canceled cancelled user_cancel interrupted interrupt timeout
        timed_out network_error server_error internal_error unavailable overloaded insufficient_system_resource
        insufficient_resources preempted not_finished malformed_function_call malformed_response malformed_model_output
        malformed_tool_use unexpected_tool_call too_many_tool_calls missing_thought_signature no_image
        disconnect disconnected exception
    """,
}

_MEANINGS: Mapping[str, Meaning] = {name: meaning for meaning, names in _NAMES.items() for name in names.split()}

MAX_CHARS = 200
"""A longer text is not a reason."""

_PREFIX = Pattern(r"^(?:finish_reason|stop_reason|finish|reason|response)_(?=.)")
_COMPOUND = Pattern(r"[a-z_]+: [A-Z_]+")
_HUMP = Pattern(r"(?<=[a-z])(?=[A-Z])")


_PARTS: tuple[tuple[Meaning, Pattern], ...] = (
    (
        Meaning.FAILURE,  # it broke off: "context_deadline_exceeded" does not mean LENGTH, nor does "rate_limit"
        Pattern(
            r"abort|cancel|timed?_?out|deadline|crash|(^|_)kill|(^|_)oom(_|$)|out_of_memory|shut_?down|disconnect|connection"
            r"|network|rate_?limit|throttl|quota|overload|unavailable|preempt|evict|interrupt|expired|exception|panic"
            r"|retry|retries"
        ),
    ),
    (
        Meaning.LENGTH,
        Pattern(
            r"length|trunc|cut_?off|too_long|overflow|out_of_(context|tokens)|(^|_)max_|limit|token_budget"
            r"|context_(window|size|exceed|full)|tokens?_(exceed|over)"
        ),
    ),
    (
        Meaning.FILTER,
        Pattern(
            r"safety|unsafe|moderat|policy|policies|filter|guard|blocked|block$|harm(ful)?(_|$)|toxi|flagged|censor|prohibit|violat"
            r"|sensitive|inappropriate|nsfw|jailbreak|offensive|sexual|(^|_)hate|csam"
        ),
    ),
    (Meaning.FAILURE, Pattern(r"error|(^|_)err(_|$)|fail|exceed|internal|corrupt|malform|invalid|(^|_)fault")),
)
"""Meanings of the parts of an unknown word; the first that fits counts. A failure that is taken for an answer is a lost
answer, so words of failure are on both ends: first those of a broken connection, last a general "error"."""

_DENIED = Pattern(r"(^|_)(no|not|non|un|without)(_|$)")
"""`no_error` means none."""


@lru_cache(maxsize=256)
def meaning_of(reason: str | None) -> Meaning:
    """Its meaning by the table, else by the parts of the word; OTHER where no part is known.

    Of a compound such as `content_filter: RECITATION` (Gemini's compatible endpoint) the last known part counts.
    """
    known = _in_table(reason)
    if known is not None or reason is None or len(reason) > MAX_CHARS:
        return known or Meaning.OTHER
    name = _name(reason)
    if not reason.isprintable() or _DENIED.search(name):
        return Meaning.OTHER
    return next((meaning for meaning, parts in _PARTS if parts.search(name)), Meaning.OTHER)


def is_known(reason: str | None) -> bool:
    """False where its meaning is only guessed from its parts, or unknown."""
    return reason in NO_REASON or _in_table(reason) is not None


@lru_cache(maxsize=256)
def _in_table(reason: str | None) -> Meaning | None:
    if reason is None or len(reason) > MAX_CHARS:
        return None
    parts = reason.split(": ") if _COMPOUND.fullmatch(reason) else (reason,)
    for part in reversed(parts):
        name = _name(part)
        for known in (name, _PREFIX.sub("", name)):
            if known in _MEANINGS:
                return _MEANINGS[known]
    return None


def _name(reason: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", _HUMP.sub("_", reason).lower()).strip("_")
