"""Reads the usage and cost that an answer states, in any vendor's words. PURE.

The common shape, OpenAI's, is read at once. All others are read by tables of names, drawn from the extractors of the
price list `genai-prices` and the vendors' pages; docs/golden_bills.md has an example of each with its bill.
"""

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from batchrun.money import MAX_USD, to_pico
from batchrun.records import Usage

MAX_COUNT = 10**9
"""Tokens. No request has a billion; a larger count is an error of the server's that no bill should be made of."""

MAX_UNSTATED = 65_536
"""Tokens that a total may have beyond prompt and completion where nothing states them. Gemini's compatible endpoint
hides its thinking there, and answers with no more (ai.google.dev, "Models": output token limit). A larger total adds up
several requests, and is ignored."""

TICKS_PER_USD = 10**10
"""docs.x.ai, "Cost Tracking": the unit of `cost_in_usd_ticks`."""

LITELLM_COST = "x-litellm-response-cost"
"""The header in which LiteLLM states the cost (docs.litellm.ai, "Response Headers"); 0 where it knows no price."""

_COMMON = frozenset(
    {"prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "completion_tokens_details"}
)

_READ_ONLY = frozenset({"cached_tokens", "audio_tokens", "text_tokens", "image_tokens"})
"""Details of a prompt that say nothing of tokens written to a cache."""

Path = tuple[str, ...]

_PROMPT: tuple[Path, ...] = (
    ("prompt_tokens",),  # OpenAI and its imitators
    ("input_tokens",),  # Anthropic, OpenAI's Responses
    ("promptTokenCount",),  # Google
    ("prompt_token_count",),  # Google's own client
    ("inputTokens",),  # Bedrock
    ("billed_units", "input_tokens"),  # Cohere
    ("tokens", "input_tokens"),
    ("promptTokens",),  # Vercel's AI SDK
)
_COMPLETION: tuple[Path, ...] = (
    ("completion_tokens",),
    ("output_tokens",),
    ("candidatesTokenCount",),
    ("candidates_token_count",),
    ("outputTokens",),
    ("billed_units", "output_tokens"),
    ("tokens", "output_tokens"),
    ("completionTokens",),
)
_TOTAL: tuple[Path, ...] = (("total_tokens",), ("totalTokenCount",), ("total_token_count",), ("totalTokens",))
_CACHED: tuple[Path, ...] = (
    ("prompt_tokens_details", "cached_tokens"),
    ("prompt_tokens_details", "cache_read_input_tokens"),  # Novita
    ("prompt_tokens_details", "cache_read_tokens"),
    ("prompt_token_details", "cached_tokens"),  # Mistral
    ("num_cached_tokens",),
    ("input_tokens_details", "cached_tokens"),
    ("input_tokens_details", "cache_read_input_tokens"),  # Perplexity
    ("prompt_cache_hit_tokens",),  # DeepSeek
    ("cached_tokens",),  # Moonshot, Cohere
    ("cache_read_input_tokens",),  # Anthropic, Databricks, LiteLLM
    ("cached_prompt_text_tokens",),  # xAI
    ("cachedContentTokenCount",),  # Google
    ("cached_content_token_count",),
    ("cacheReadInputTokens",),  # Bedrock
    ("cachedInputTokens",),  # Vercel's AI SDK
)
_WRITTEN: tuple[Path, ...] = (
    ("prompt_tokens_details", "cache_write_tokens"),  # OpenRouter
    ("prompt_tokens_details", "cache_creation_input_tokens"),  # Alibaba
    ("prompt_tokens_details", "cache_creation_tokens"),  # LiteLLM
    ("input_tokens_details", "cache_write_tokens"),
    ("cache_creation_input_tokens",),  # Anthropic
    ("cacheWriteInputTokens",),  # Bedrock
)
_TIERS: tuple[Path, ...] = (
    ("usage", "service_tier"),  # Anthropic
    ("usage", "extra_properties", "google", "traffic_type"),  # Vertex: ON_DEMAND_FLEX, PROVISIONED_THROUGHPUT
    ("usageMetadata", "trafficType"),
)
_WRITTEN_1H: tuple[Path, ...] = (("cache_creation", "ephemeral_1h_input_tokens"),)
_REASONING: tuple[Path, ...] = (
    ("completion_tokens_details", "reasoning_tokens"),
    ("completion_token_details", "reasoning_tokens"),
    ("output_tokens_details", "reasoning_tokens"),
    ("output_tokens_details", "thinking_tokens"),  # Anthropic
    ("reasoning_tokens",),  # Perplexity, Databricks, Modal
    ("thoughtsTokenCount",),  # Google
    ("thoughts_token_count",),
)
_CACHE_BESIDE_PROMPT = frozenset({"input_tokens", "inputTokens"})
"""Vendors that call the prompt so, and cache hits as below, count those beside it (Anthropic, Bedrock)."""

_BESIDE: tuple[Path, ...] = (
    ("cache_read_input_tokens",),
    ("cache_creation_input_tokens",),
    ("cacheReadInputTokens",),
    ("cacheWriteInputTokens",),
)
_OUTPUT_BESIDE_COMPLETION: tuple[Path, ...] = (("thoughtsTokenCount",), ("thoughts_token_count",))
_PROMPT_BESIDE_PROMPT: tuple[Path, ...] = (("toolUsePromptTokenCount",), ("tool_use_prompt_token_count",))


_DOLLARS = frozenset({"USD", "US$", "$"})


def stated_in(body: Mapping[str, Any]) -> tuple[Usage | None, str | None, int | None]:
    """Usage, service tier and cost of a whole answer: all that it says of its bill."""
    usage = body.get("usage")
    if isinstance(usage, dict) and usage.keys() <= _COMMON and "provider_metadata" not in body:
        tier = body.get("service_tier")
        if (found := _common(usage)) is not None:
            return found, None if tier is None else _service_tier(body), None

    choices = body.get("choices")
    each = (in_choice(choice) for choice in choices) if isinstance(choices, list) else ()
    of_all = of_choices(usage for usage in each if usage is not None)
    places = (*of_answer(body), of_all)
    found = next((found for usage in places if (found := read(usage)) is not None), None)
    return found, _service_tier(body), _reported_cost(body)


def read(usage: Any) -> Usage | None:
    """Both counts that are billed, or None: half a usage can't be priced."""
    if not isinstance(usage, dict):
        return None
    return _common(usage) if usage.keys() <= _COMMON else _in_other_words(usage)


def found_in(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object in a stream's event that states some usage or a cost. Usage inside a choice does not count."""
    for usage in of_answer(body):
        if _first(usage, (*_PROMPT, *_COMPLETION)) is not None or _reported_cost({"usage": usage}) is not None:
            return usage
    return None


def joined(earlier: dict[str, Any] | None, later: dict[str, Any]) -> dict[str, Any]:
    """The usage of two events of one stream: the later counts, except nulls and zeros.

    A later event that states a prompt of 0 and a completion leaves the prompt as it was (proxies of Anthropic's
    streams). Where its completion is smaller than the one before, it states what is new, and both are added.
    """
    if not earlier:
        return later
    both = earlier | {name: value for name, value in later.items() if name not in earlier or _is_more_than_zero(value)}
    name = next((path[0] for path in _COMPLETION if count(later.get(path[0]))), None)
    if name is None or _first(later, _PROMPT) != 0 or not (prompt := _first(earlier, _PROMPT)):
        return both
    completion, before = _first(later, _COMPLETION) or 0, _first(earlier, _COMPLETION) or 0
    whole = before + completion if completion < before else completion
    total = _first(later, _TOTAL) or 0
    if total < prompt + whole:  # it leaves the prompt out as well
        total = prompt + whole + max(0, total - completion)
    return {**{key: value for key, value in both.items() if (key,) not in _TOTAL}, name: whole, "total_tokens": total}


def _is_more_than_zero(value: Any) -> bool:
    """False for null, zero, and an object of nothing else."""
    if isinstance(value, dict):
        return any(map(_is_more_than_zero, value.values()))
    return value not in (None, 0, "0")


def in_choice(choice: Any) -> dict[str, Any] | None:
    """The object in which a choice states its usage."""
    usage = choice.get("usage") if isinstance(choice, dict) else None
    return usage if isinstance(usage, dict) else None


def of_choices(stated: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """One usage of all choices' (Moonshot): the prompt is read once, each completion is written."""
    usages = list(stated)
    if len(usages) < 2:
        return usages[0] if usages else None
    prompt = max(_first(usage, _PROMPT) or 0 for usage in usages)
    completions = sum(max(_first(usage, _COMPLETION) or 0, (_first(usage, _TOTAL) or 0) - prompt) for usage in usages)
    counts = {"prompt_tokens": prompt, "completion_tokens": completions, "total_tokens": prompt + completions}
    return usages[0] | counts


def cost_in_headers(headers: Mapping[str, str]) -> int | None:
    """10⁻¹² USD that a gateway states in a header."""
    return _pico_usd(headers.get(LITELLM_COST)) or None


def count(value: Any) -> int | None:
    """A token count: an integer, or digits in a string as some servers send them; anything else is unknown."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_COUNT else None


def _service_tier(body: Mapping[str, Any]) -> str | None:
    """The tier that served the request: beside the answer, or in its usage."""
    tier = body.get("service_tier")
    if tier is None:
        tier = next((name for path in _TIERS if (name := _at(body, path)) is not None), None)
    return tier[:100].lower().removeprefix("on_demand_") if isinstance(tier, str) else None


def _reported_cost(body: Mapping[str, Any]) -> int | None:
    """10⁻¹² USD that the server itself states for the answer; None where it states no sum of money in USD."""
    usage = body.get("usage")
    if isinstance(usage, dict) and not usage.keys() <= _COMMON:
        named = [
            each.get(name)
            for each in (body, usage, usage.get("cost"))
            if isinstance(each, dict)
            for name in ("currency", "cost_currency")
        ]
        if all(str(currency).strip().upper() in _DOLLARS for currency in named if currency):
            if (cost := _pico_usd(usage.get("cost_in_usd_ticks"), per_usd=TICKS_PER_USD)) is not None:  # xAI
                return cost
            if (cost := _pico_usd(usage.get("cost"))) is not None:  # OpenRouter; an object at Perplexity
                if usage.get("is_byok") is not True:
                    return cost
                # The key is the user's own at the vendor, who bills this part; not stated, the sum is unknown.
                upstream = _pico_usd(_at(usage, ("cost_details", "upstream_inference_cost")))
                return None if upstream is None else cost + upstream
            for name in ("estimated_cost", "total_cost", "cost_usd"):  # the first is DeepInfra's
                if (cost := _pico_usd(usage.get(name))) is not None:
                    return cost
    return _pico_usd(_at(body, ("provider_metadata", "gateway", "cost")))  # Vercel


def _pico_usd(value: Any, per_usd: int = 1) -> int | None:
    """A sum of money as JSON has it, in 10⁻¹² USD: a number, digits in a text, or an object with a total."""
    if isinstance(value, dict):
        value = value.get("total_cost", value.get("total"))
    if isinstance(value, bool) or not isinstance(value, int | float | str) or len(str(value)) > 60:
        return None
    try:
        usd = Decimal(str(value))
    except InvalidOperation:
        return None
    if per_usd > 1:
        usd /= per_usd
    return to_pico(usd) if usd.is_finite() and 0 <= usd <= MAX_USD else None


def _common(usage: Mapping[str, Any]) -> Usage | None:
    prompt, completion = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    if prompt is None or completion is None:
        return _in_other_words(usage)
    if not (prompt or completion):
        return None
    total = count(usage.get("total_tokens"))
    cached = written = reasoning = None
    if isinstance(details := usage.get("prompt_tokens_details"), dict):
        cached = count(details.get("cached_tokens"))
        if not details.keys() <= _READ_ONLY:
            cached, written = _largest(usage, _CACHED), _largest(usage, _WRITTEN)
        if cached and (cached > prompt or total == prompt + completion + cached):
            return _in_other_words(usage)
    if isinstance(details := usage.get("completion_tokens_details"), dict):
        reasoning = count(details.get("reasoning_tokens"))
    if total is None:
        total = prompt + completion
    if reasoning is not None and reasoning > completion:
        total = max(total, prompt + completion + reasoning)  # more than the completion: it can't be a part of it
    total = _plausible(total, prompt + completion, reasoning)
    return Usage(prompt, completion, total, cached, reasoning, written)


def _in_other_words(usage: Mapping[str, Any]) -> Usage | None:
    prompt, completion, total = _first(usage, _PROMPT), _first(usage, _COMPLETION), _first(usage, _TOTAL)
    if completion is None and _first(usage, (("promptTokenCount",),)) is not None:
        completion = 0  # Google leaves out a count of nothing
    # the total and one of the two say what the other is
    if total is not None and prompt is not None and completion is None and total > prompt:
        completion = total - prompt
    elif total is not None and completion is not None and prompt is None and total > completion:
        prompt = total - completion
    if prompt is None or completion is None or not (prompt or completion):
        return None

    cached, written, reasoning = _largest(usage, _CACHED), _largest(usage, _WRITTEN), _largest(usage, _REASONING)
    if cached and cached == written and cached <= prompt < 2 * cached and total == prompt + completion:
        written = 0  # a gateway kept the count of an earlier event of its stream: the same tokens were only read
    cache = (cached or 0) + (written or 0)
    if cache and _cache_is_beside(usage, prompt, cache, (total or 0) - prompt - completion, reasoning or 0):
        prompt += cache
        total = None if total is None else max(total, prompt + completion)
    prompt += sum(_counts(usage, _PROMPT_BESIDE_PROMPT))
    completion += sum(_counts(usage, _OUTPUT_BESIDE_COMPLETION))

    # What is billed beside the completion, and at these vendors is not in the total either.
    output = completion
    if "citation_tokens" in usage or "num_search_queries" in usage:  # Perplexity
        output += (reasoning or 0) + (count(usage.get("citation_tokens")) or 0)
    elif (reasoning or 0) > completion or (
        "total_tokens" not in usage and ("cost_in_usd_ticks" in usage or "num_sources_used" in usage)  # xAI
    ):
        output += reasoning or 0
    total = prompt + output if total is None else total
    if output > completion:
        total = max(total, prompt + output)
    total = _plausible(total, prompt + output, reasoning)
    return Usage(prompt, completion, total, cached, reasoning, written, _largest(usage, _WRITTEN_1H))


def _plausible(total: int, stated: int, reasoning: int | None) -> int:
    """The total; the counts stated beside it if the total is too large for one answer."""
    return stated if total - stated > max(MAX_UNSTATED, reasoning or 0) else total


def _cache_is_beside(usage: Mapping[str, Any], prompt: int, cache: int, excess: int, reasoning: int) -> bool:
    """True if the prompt's count does not include the cache's tokens.

    Three signs: the vendor's names for its counts, a total whose `excess` over prompt and completion is the cache, or a
    prompt that is smaller than the cache.
    """
    if "prompt_tokens" not in usage and _CACHE_BESIDE_PROMPT & usage.keys() and _first(usage, _BESIDE) is not None:
        return True
    return cache > prompt or (excess == cache and excess != reasoning)


def of_answer(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects that state the usage of the whole answer."""
    for path in (("usage",), ("x_groq", "usage"), ("usageMetadata",), ("usage_metadata",), ("result", "usage")):
        if isinstance(usage := _at(body, path), dict):
            yield usage


def _at(value: Any, path: Path) -> Any:
    for name in path:
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _counts(usage: Mapping[str, Any], paths: tuple[Path, ...]) -> Iterator[int]:
    for path in paths:
        value = usage.get(path[0])
        if value is None:
            continue  # most names are of other vendors
        if (number := count(_at(value, path[1:]))) is not None:
            yield number


def _first(usage: Mapping[str, Any], paths: tuple[Path, ...]) -> int | None:
    return next(_counts(usage, paths), None)


def _largest(usage: Mapping[str, Any], paths: tuple[Path, ...]) -> int | None:
    """Vendors that state one figure under two names leave one of them at 0."""
    return max(_counts(usage, paths), default=None)
