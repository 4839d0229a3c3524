"""Finds in an answer without a message that the server blocked the question, or all of the answer. PURE.

Azure sends a 200 with no choice and the filter's results (learn.microsoft.com, "Content filtering"), Google one with no
candidate and its `promptFeedback` (ai.google.dev, GenerateContentResponse); others a choice without a message, whose
finish_reason says it. No retry changes that, and the row is filtered.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from batchrun.response.error_body import Failure
from batchrun.response.finish_reasons import Meaning, meaning_of

CODE = "content_filter"
RESULTS = ("prompt_filter_results", "prompt_annotations", "promptFeedback", "prompt_feedback")
"""The fields in which the answer as a whole says it; the second is the older name of the first."""


def failure_in(body: Mapping[str, Any], finish_reason: str | None) -> Failure | None:
    """The failure of an answer without a message; None: nothing says that it was blocked."""
    why = sorted(set(_reasons(body)))
    if why:
        return Failure(f"the question was blocked by the content filter: {', '.join(why)[:200]}", CODE)
    if meaning_of(finish_reason) is Meaning.FILTER:
        return Failure(f"the answer was blocked by the content filter: {finish_reason!r:.100}", CODE)
    return None


def _reasons(body: Mapping[str, Any]) -> Iterator[str]:
    """The categories that were blocked."""
    for name in RESULTS:
        value = body.get(name)
        if isinstance(value, dict):
            reason = value.get("blockReason") or value.get("block_reason")
            if isinstance(reason, str):
                yield reason
        for each in value if isinstance(value, list) else ():
            found = each.get("content_filter_results") if isinstance(each, dict) else None
            for category, result in (found if isinstance(found, dict) else {}).items():
                if isinstance(result, dict) and result.get("filtered") is True:
                    yield category
