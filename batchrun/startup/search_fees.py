"""Finds tools of the server in a job, such as web search, that cost a fee which a cap on cost can't reserve. PURE."""

from collections.abc import Iterator, Mapping

from batchrun.job.job import Job
from batchrun.prices import PriceTable
from batchrun.records import Notice

_CLIENT_TOOLS = frozenset({"function", "custom"})
"""Types of tools that the caller runs; any other type is a tool of the server's (`web_search`, `file_search`)."""

_PARAMETERS = ("web_search_options", "search_parameters", "enable_search", "plugins")
"""OpenAI and Perplexity, xAI, Alibaba, OpenRouter."""

_ONLINE = ":online"
"""The end of a model's name with which OpenRouter searches the web for every request."""


def warning(job: Job, tables: Mapping[str, PriceTable | None]) -> Notice | None:
    """Warns that a cap on cost does not reserve these fees. None without a cap, or if the job states a fee.

    Parameters that rows bring are not checked.
    """
    if not job.budget.caps_usd:
        return None
    unstated = [model for model, table in tables.items() if table is None or not table.per_request]
    found = [*_requested(job), *(f"request.model {model}" for model in unstated if model.endswith(_ONLINE))]
    if not found or not unstated:
        return None
    caps = ", ".join(f"budget.{name}" for name in job.budget.caps_usd)
    line = (
        f"warning: the server may search or run tools for a fee ({', '.join(found)}), and no price list has such fees: "
        f"{caps} does not reserve them; to reserve and count the most that a request pays, set per_request with the "
        f'prices in [pricing."{unstated[0]}"]'
    )
    return Notice(line, "unreserved fees", what=found)


def _requested(job: Job) -> Iterator[str]:
    """The paths of the job's parameters that request such a tool."""
    extra = job.request.extra
    for name in _PARAMETERS:
        if extra.get(name) not in (None, False, []):
            yield f"request.extra.{name}"
    tools = extra.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind not in _CLIENT_TOOLS:
            yield f"request.extra.tools: {kind}"
