"""Usage that no price of text covers is named, by whichever field the vendor states it in."""

from typing import Any

import pytest

from batchrun.response import billed_apart

USAGES: tuple[tuple[str | None, dict[str, Any]], ...] = (
    ("audio", {"prompt_tokens_details": {"audio_tokens": 3}}),
    ("audio", {"completion_tokens_details": {"audio_tokens": 3}}),
    ("audio", {"input_tokens_details": {"audio_tokens": 3}}),
    ("audio", {"output_tokens_details": {"audio_tokens": 3}}),
    ("audio", {"prompt_audio_seconds": 0.5}),
    ("audio", {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 9}, {"modality": "AUDIO", "tokenCount": 3}]}),
    ("audio", {"candidatesTokensDetails": [{"modality": "AUDIO", "tokenCount": 3}]}),
    ("images", {"completion_tokens_details": {"image_tokens": 1}}),
    ("images", {"output_tokens_details": {"image_tokens": 1}}),
    ("images", {"candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 258}]}),
    ("web searches", {"server_tool_use": {"web_search_requests": 2}}),
    ("web searches", {"server_tool_use_details": {"web_search_requests": 2}}),
    ("web searches", {"num_sources_used": 5}),
    ("web searches", {"num_server_side_tools_used": 1}),
    ("web searches", {"num_search_queries": 1}),
    ("web searches", {"num_search_queries": "10"}),
    ("web searches", {"billed_units": {"search_units": 1}}),
    ("web searches", {"plugins": {"search": {"count": 1}}}),
    (
        "audio, images, web searches",
        {"num_sources_used": 1, "output_tokens_details": {"image_tokens": 1, "audio_tokens": 1}},
    ),
    (None, {}),
    (None, {"prompt_tokens": 9, "completion_tokens": 3}),
    (None, {"num_sources_used": 0, "num_search_queries": "00", "prompt_audio_seconds": None}),
    (None, {"num_sources_used": True, "num_search_queries": "²", "num_server_side_tools_used": "one"}),
    (None, {"plugins": "search", "server_tool_use": [1], "billed_units": None}),
    (None, {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 9}, {"modality": "AUDIO", "tokenCount": 0}]}),
    (None, {"promptTokensDetails": "AUDIO", "candidatesTokensDetails": 7}),
    (None, {"candidatesTokensDetails": [None, "AUDIO", {"modality": "IMAGE"}]}),
    (None, {"promptTokensDetails": [{"modality": "IMAGE", "tokenCount": 258}]}),  # seen, not drawn: priced as text
)


@pytest.mark.parametrize(("kinds", "usage"), USAGES)
def test_each_vendors_count_names_its_kind(kinds: str | None, usage: dict[str, Any]) -> None:
    assert billed_apart.kinds_in({}, iter([{"prompt_tokens": 9}, usage])) == kinds


CITED = {"annotations": [{"type": "url_citation", "url_citation": {"url": "https://example.com"}}]}


@pytest.mark.parametrize(
    ("searched", "body"),
    [
        (True, {"output": [{"type": "message"}, {"type": "web_search_call"}]}),
        (True, {"output": [{"type": "file_search_call"}]}),
        (True, {"choices": [{"message": CITED}]}),
        (True, {"choices": [{"delta": {}}, {"delta": CITED}]}),
        (False, {"output": [{"type": "function_call"}, None], "choices": None}),
        (False, {"choices": [{"message": {"annotations": [{"type": "file_citation"}]}}]}),
        (False, {"choices": [{"message": {"annotations": None}}, {"message": "text"}, 1]}),
        (False, {"output": "web_search_call"}),
    ],
)
def test_a_search_shows_in_the_answer_itself(searched: bool, body: dict[str, Any]) -> None:
    """OpenAI's usage does not state it."""
    assert billed_apart.has_searched(body) is searched
    assert billed_apart.kinds_in(body, iter([])) == ("web searches" if searched else None)
