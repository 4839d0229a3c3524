"""OpenTelemetry's names for a request and its usage: the semantic conventions for generative AI. PURE.

As of opentelemetry-semantic-conventions 0.66b2, whose status is "development": names may still change.
https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/
"""

from urllib.parse import urlsplit

from batchrun.job.job import Job
from batchrun.records import FAILURES, CompletionRecord, Discarded, Ending

TOKEN_USAGE = "gen_ai.client.token.usage"  # noqa: S105  (a metric)
DURATION = "gen_ai.client.operation.duration"
TIME_TO_FIRST_CHUNK = "gen_ai.client.operation.time_to_first_chunk"

TOKEN_BUCKETS = tuple(float(4**power) for power in range(14))
SECOND_BUCKETS = tuple(0.01 * 2**power for power in range(14))
"""Both as the conventions require."""

MOST_SETS = 200
"""Different sets of attributes; a column of models must not flood a server."""

Attributes = dict[str, str | int]

_PROVIDERS = {
    "api.openai.com": "openai",
    "openai.azure.com": "azure.ai.openai",
    "cognitiveservices.azure.com": "azure.ai.openai",
    "services.ai.azure.com": "azure.ai.inference",
    "anthropic.com": "anthropic",
    "amazonaws.com": "aws.bedrock",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "cohere.com": "cohere",
    "cohere.ai": "cohere",
    "deepseek.com": "deepseek",
    "groq.com": "groq",
    "mistral.ai": "mistral_ai",
    "moonshot.ai": "moonshot_ai",
    "perplexity.ai": "perplexity",
    "x.ai": "x_ai",
}


def provider(host: str) -> str:
    """The conventions' name of the provider at this host; `openai`, whose API it has, for any other."""
    return next((name for end, name in _PROVIDERS.items() if f".{host}".endswith(f".{end}")), "openai")


def job_attributes(job: Job) -> Attributes:
    """The attributes that all requests of the job have. With several endpoints no server is named."""
    urls = [urlsplit(each.url) for each in job.endpoints]
    hosts = {url.hostname or "" for url in urls}
    names = {provider(host) for host in hosts}
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": names.pop() if len(names) == 1 else "openai",
        "batchrun.job": job.name,
    }
    if len(urls) == 1 and urls[0].hostname:
        attributes["server.address"] = urls[0].hostname
        attributes["server.port"] = urls[0].port or (443 if urls[0].scheme == "https" else 80)
    return attributes


def error_type(ending: Ending) -> str | None:
    """The class of an attempt's error: its HTTP status, or its kind; None where it was answered."""
    if isinstance(ending, Discarded):
        kind: str | None = ending.error_kind or "unknown"
    else:
        kind = None if ending.status not in FAILURES else "invalid" if ending.error is None else ending.error.kind
    status = ending.http_status
    return kind if kind is None or status is None or status < 400 else str(status)


class AttributeSets:
    """The attributes of requests, made once for each model, answering model and error."""

    def __init__(self, of_all: Attributes) -> None:
        self._of_all = of_all
        self._known: dict[tuple[str, str | None, str | None], tuple[Attributes, Attributes, Attributes]] = {}

    def of(self, ending: Ending) -> tuple[Attributes, Attributes, Attributes]:
        """For the duration, for its input tokens and for its output tokens."""
        answered = ending.answered_model if isinstance(ending, CompletionRecord) else None
        key = ending.model, answered, error_type(ending)
        if (known := self._known.get(key)) is None:
            if len(self._known) >= MOST_SETS:
                key = "(other)", None, key[2]
            model, answered, error = key
            named: Attributes = {**self._of_all, "gen_ai.request.model": model}
            if answered is not None:
                named["gen_ai.response.model"] = answered
            failed: Attributes = named if error is None else {**named, "error.type": error}
            input_, output = {**named, "gen_ai.token.type": "input"}, {**named, "gen_ai.token.type": "output"}
            known = self._known[key] = failed, input_, output
        return known
