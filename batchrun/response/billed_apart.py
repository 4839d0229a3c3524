"""Finds usage that a vendor bills beside the tokens of text, or at another price than theirs. PURE.

The price list has prices of text. An answer that also heard, spoke, drew or searched costs more than those say, so its
cost is what the server states, or unknown. `audio`: OpenAI's and Google's audio tokens cost a multiple of text.
`images`: so do those that a model draws. `web searches`: a fee for each (Anthropic, xAI, OpenRouter, OpenAI, Alibaba).
"""

from collections.abc import Iterator, Mapping
from typing import Any

AUDIO, IMAGES, SEARCHES = "audio", "images", "web searches"

_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (AUDIO, ("prompt_tokens_details", "audio_tokens")),
    (AUDIO, ("completion_tokens_details", "audio_tokens")),
    (AUDIO, ("input_tokens_details", "audio_tokens")),
    (AUDIO, ("output_tokens_details", "audio_tokens")),
    (AUDIO, ("prompt_audio_seconds",)),  # Mistral
    (IMAGES, ("completion_tokens_details", "image_tokens")),
    (IMAGES, ("output_tokens_details", "image_tokens")),
    (SEARCHES, ("server_tool_use", "web_search_requests")),  # Anthropic, OpenRouter
    (SEARCHES, ("server_tool_use_details", "web_search_requests")),
    (SEARCHES, ("num_sources_used",)),  # xAI
    (SEARCHES, ("num_server_side_tools_used",)),
    (SEARCHES, ("num_search_queries",)),  # Perplexity
    (SEARCHES, ("billed_units", "search_units")),  # Cohere
    (SEARCHES, ("plugins", "search", "count")),  # Alibaba
)
_BY_MODALITY = (
    (AUDIO, "promptTokensDetails", "AUDIO"),
    (AUDIO, "candidatesTokensDetails", "AUDIO"),
    (IMAGES, "candidatesTokensDetails", "IMAGE"),
)
"""Google's counts: a list of `{"modality", "tokenCount"}`."""

_SEARCH_CALLS = frozenset({"web_search_call", "file_search_call"})
"""Items of the output of the Responses API that have a fee each (developers.openai.com, "Pricing")."""


def kinds_in(body: Mapping[str, Any], usages: Iterator[Mapping[str, Any]]) -> str | None:
    """The kinds that the answer or one of its usages names, joined with commas; None: text alone."""
    found = {what for usage in usages for what in _in_usage(usage)}
    if has_searched(body):
        found.add(SEARCHES)
    return ", ".join(sorted(found)) or None


def _in_usage(usage: Mapping[str, Any]) -> Iterator[str]:
    for what, (first, *more) in _PARTS:
        value = usage.get(first)
        for name in more:
            value = value.get(name) if isinstance(value, dict) else None
        if _is_some(value):
            yield what
    for what, field, modality in _BY_MODALITY:
        counts = [each for each in _objects(usage, field) if each.get("modality") == modality]
        if any(_is_some(each.get("tokenCount")) for each in counts):
            yield what


def has_searched(body: Mapping[str, Any]) -> bool:
    """True where the answer or an event of its stream cites pages of the web, or names a search that the server ran.

    OpenAI's usage does not say so.
    """
    if any(item.get("type") in _SEARCH_CALLS for item in _objects(body, "output")):
        return True
    messages = [choice.get("message") or choice.get("delta") for choice in _objects(body, "choices")]
    notes = [note for message in messages if isinstance(message, dict) for note in _objects(message, "annotations")]
    return any(note.get("type") == "url_citation" for note in notes)


def _objects(body: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    """The objects in a field that should be a list of them."""
    values = body.get(field)
    return [each for each in values if isinstance(each, dict)] if isinstance(values, list) else []


def _is_some(value: Any) -> bool:
    """True for a count above zero, as a number or in digits."""
    if isinstance(value, str):
        return value.isascii() and value.isdigit() and value.strip("0") != ""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
