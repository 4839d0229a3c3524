"""Refusals as vendors, servers and gateways really send them: what each asks of the run, and what it says.

The bodies are what the named vendors document, or what users of them report in public issue threads, shortened.
"""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from multidict import CIMultiDict

from batchrun.job.settings import Retry
from batchrun.policy import Judgement, judge
from batchrun.records import Attempt, Verdict
from batchrun.response.answer import parse
from tests.unit.test_answer import body, chunk, stream

OK, ROW, FREE, MAYBE, SLOW, PAUSE, STOP = Verdict


def judged(status: int, said: object, headers: Mapping[str, str] | None = None) -> Judgement:
    """The judgement on an answer whose body is `said`: bytes as they are, else as JSON."""
    raw = said if isinstance(said, bytes) else json.dumps(said, ensure_ascii=False).encode()
    return judge(Attempt(0.0, 1.0, status, CIMultiDict(headers or {}), raw), parse(raw), Retry())


def error(message: str, code: object = None, type: str | None = None, **more: object) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": None, "code": code, **more}}


# -- 503 and 403

OUTAGES: dict[str, object] = {
    "gateway without workers": error("No available workers (all circuits open or unhealthy)"),
    "envoy": b"no healthy upstream",
    "envoy reset": b"upstream connect error or disconnect/reset before headers. reset reason: connection failure",
    "nginx": b"<html><head><title>503 Service Temporarily Unavailable</title></head><body>nginx</body></html>",
    "Cloudflare": b"<!DOCTYPE html><html><head><meta http-equiv='Content-Security-Policy'></head>"
    b"<body>You have been blocked. Error 503: content policy</body></html>",
    "CloudFront": b"<HTML><BODY><H1>503 ERROR</H1>Request blocked. We can't connect to the server</BODY></HTML>",
    "vLLM": error("Engine is dead", 503, "Internal Server Error"),
    "FastAPI": {"detail": "Worker died"},
    "FastAPI, plain": {"detail": "Service Unavailable"},
    "AWS": {"__type": "ServiceUnavailableException", "message": "Bedrock is unable to process your request."},
    "AWS model": {"message": "Model is getting throttled. Try your request again."},
    "HF": {"error": "Model org/name is currently loading", "estimated_time": 20.0},
    "Google": error("The model is overloaded. Please try again later.", 503, status="UNAVAILABLE"),
    "OpenAI": error("The server is currently overloaded with other requests.", None, "server_error"),
    "OpenRouter": error("No instances available", 503, metadata={"provider_name": "x", "raw": "ok"}),
    "Kong": {"message": "failure to get a peer from the ring-balancer"},
    "Traefik": b"Service Unavailable",
    "Istio": {"code": 503, "reason": "UH", "flags": "no_healthy_upstream"},
    "Ray Serve": {"error": "Request dropped due to backpressure (num_queued_requests=8)"},
    "LiteLLM": error("litellm.ServiceUnavailableError: Connection error.", "503"),
    "Triton": {"error": "Socket closed"},
    "TGI": {"error": "Request failed during generation: CUDA out of memory", "error_type": "generation"},
    "RFC 9457": {"type": "about:blank", "title": "Service Unavailable", "status": 503, "detail": "Pod evicted"},
    "the filter itself is down": error("The content filter is temporarily unavailable", "content_filter_error"),
    "the moderation is down": {"detail": "moderation service timed out"},
    "the breaker": {"message": "Request blocked by circuit breaker"},
    "the firewall": {"message": "Your IP address is blocked"},
    "load shedding": {"error": "shed", "message": "rejected by the load shedding policy"},
    "Cloudflare, JSON": {"error": "Request blocked by Cloudflare"},
    "the classifier": error("The safety classifier failed to respond"),
    "routing": error("Blocked: no route by routing policy"),
    "new-api": error("当前分组 default 下对于模型 m 无可用渠道", None, "new_api_error"),
    "dynamo": error("Model `m` is not ready to serve requests yet. Please retry shortly.", 503, "service_unavailable"),
    "model name": error("Model llama-guard-safety is not loaded"),
    "a word": error("no"),
    "nothing": {},
    "null": None,
    "a list": [],
    "empty": b"",
    "a number": 503,
    "the question comes back": {"error": {"message": "no worker", "request": {"prompt": "content policy violation"}}},
    "a type of content": error("Invalid content type", "bad_gateway"),
    "a page on policies": error("Service overloaded. See https://openai.com/policies/usage-policies"),
    "a page on policies, nothing else": error("Something went wrong: https://x.example/content-policy"),
    "the policy as advice": error("Out of capacity. Read our content policy"),
    "a thread": error("IO thread blocked for 30000 ms"),
    "a loop": error("event loop blocked"),
    "a queue": error("the queue is blocked"),
    "a host": error("Disallowed host"),
    "a network": error("network policy violation"),
    "a pod": error("Pod security policy violation: sensitive mount"),
    "a mesh": error("RBAC: access denied, violates authorization policy"),
    "OpenRouter's routing": error("No endpoints found matching your data policy"),
    "a provider": error("Provider violates data policy: no endpoints"),
    "all providers": error("All providers for this model violated the latency policy"),
    "a deployment": error("Deployment is flagged for deletion"),
    "an SLA": error("Service violates SLA terms"),
    "zh, the filter is down": error("内容安全服务暂时不可用"),
    "zh, the filter is slow": error("内容安全服务超时"),
    "zh, busy": error("系统繁忙，请稍后重试"),
    "ja": error("コンテンツフィルタは一時的に利用できません。不適切"),
    "ko": error("콘텐츠 필터가 일시적으로 차단되었습니다"),
    "fr": error("Le filtre de contenu bloqué est temporairement indisponible"),
    "de": error("Inhaltsfilter vorübergehend nicht verfügbar"),
    "es": error("El filtro de contenido no está disponible"),
}


@pytest.mark.parametrize("said", OUTAGES.values(), ids=OUTAGES.keys())
def test_a_503_about_content_is_no_outage(said: object) -> None:
    judgement = judged(503, said)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind, judgement.filtered) == (SLOW, "overloaded", False)


BLOCKED: dict[str, object] = {
    "the vendor's name for it": error("Content Policy Violation"),
    "as plain text": b"Content Policy Violation",
    "as its code": error("no", "content_policy_violation"),
    "in its envelope": {"status": {"code": 503, "message": "Content blocked", "error_code": 50301}, "data": None},
    "with words of load": error("Content policy violation: this content is unavailable. Do not try again."),
    "blocked": error("blocked"),
    "OpenAI": error("Your request was rejected as a result of our safety system.", "content_policy_violation"),
    "Azure": error(
        "The response was filtered due to the prompt triggering our content management policy.",
        "content_filter",
        innererror={"code": "ResponsibleAIPolicyViolation"},
    ),
    "OpenRouter": error("Your input was flagged by moderation", 403, metadata={"reasons": ["violence"]}),
    "xAI": {"code": "refused", "error": "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO"},
    "DashScope": {"code": "data_inspection_failed", "message": "Input data may contain inappropriate content."},
    "DeepSeek": error("Content Exists Risk", "invalid_request_error"),
    "MiniMax": {"base_resp": {"status_code": 1027, "status_msg": "output new_sensitive"}},
    "Zhipu": error("系统检测到输入或生成内容可能包含不安全或敏感内容", "1301"),
    "Bedrock": {"message": "The guardrail intervened"},
    "not processed": error("The request could not be processed because it contains sensitive content"),
    "not passed": error("Your prompt failed to pass the safety check"),
    "not able": error("Unable to generate an answer: blocked for safety"),
    "health": error("Content about mental health of minors is prohibited"),
    "terms": error("This may violate our terms of use"),
    "in a detail": {"detail": {"reason": "prompt flagged as harmful"}},
    "in a list": {"errors": [{"message": "Prohibited content in the prompt"}]},
    "Azure, with advice and a page": error(
        "The response was filtered due to the prompt triggering the content management policy. Please modify your "
        "prompt and retry. To learn more about our content filtering policies: https://go.microsoft.com/fwlink/?linkid=1"
    ),
    "the user's words": error("The user prompt was flagged for violence"),
    "the model's words": error("The model output was blocked by the content filter"),
    "Alibaba": error("输入内容涉及违规"),
    "ko": error("내용이 정책을 위반했습니다"),
    "ja": error("コンテンツポリシー違反"),
    "fr": error("Contenu bloqué par la politique de modération"),
    "de": error("Inhalt verstößt gegen Richtlinien"),
    "es": error("Política de contenido: solicitud rechazada"),
    "es, the other way": error("El contenido fue bloqueado"),
    "pt": error("O conteúdo viola a política de uso"),
    "it": error("Il contenuto viola le linee guida"),
    "ru": error("Запрос нарушает правила использования"),
}


@pytest.mark.parametrize("status", [403, 503])
@pytest.mark.parametrize("said", BLOCKED.values(), ids=BLOCKED.keys())
def test_a_body_about_content_blames_the_row(said: object, status: int) -> None:
    judgement = judged(status, said)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind, judgement.filtered) == (ROW, "content_policy", True)


FORBIDDEN: dict[str, object] = {
    "balance": error("Insufficient balance"),
    "model": error("Project does not have access to model `m`", "model_not_found"),
    "country": error("Country, region, or territory not supported", "unsupported_country_region_territory"),
    "xAI": {"code": "forbidden", "error": "Your team has used all available credits, or the key is blocked"},
    "Cloudflare": b"<html><title>Attention Required!</title>Sorry, you have been blocked</html>",
    "Google": [{"error": {"code": 403, "message": "The caller lacks permission", "status": "PERMISSION_DENIED"}}],
    "nothing": b"",
    "region": error("Requests from your region are blocked"),
    "account": error("Your account has been flagged"),
    "organization": error("Your organization is blocked from this model"),
    "access": error("API access blocked"),
}


@pytest.mark.parametrize("said", FORBIDDEN.values(), ids=FORBIDDEN.keys())
def test_other_403_concern_key_or_balance(said: object) -> None:
    judgement = judged(403, said)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind, judgement.filtered) == (PAUSE, "forbidden", False)


# -- 429 and what is said under other names

RETRY_INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "32s"}
GEMINI = "You exceeded your current quota, please check your plan and billing details."
OPENAI = "Rate limit reached for m in organization o on tokens per min (TPM): Limit 30000. Please try again in 7m12.5s."
OPENAI_DAY = "Rate limit reached for m in organization o on requests per day (RPD): Limit 200, Used 200, Requested 1."
GROQ_DAY = (
    "Rate limit reached for model `m` on tokens per day (TPD): Limit 100000. Please try again in 59m12.5s. Upgrade"
)


def quota_failure(quota: str) -> dict[str, Any]:
    return {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota}]}


LIMITS: dict[str, tuple[int, object, dict[str, str], Verdict, str, float | None]] = {
    # status, body, headers, verdict, kind, seconds to wait
    "OpenAI, a minute": (429, error(OPENAI, "rate_limit_exceeded", "tokens"), {}, SLOW, "rate_limit", 432.5),
    "OpenAI, empty": (
        429,
        error(GEMINI, "insufficient_quota", "insufficient_quota"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "OpenAI, empty, no code": (429, error(GEMINI), {}, PAUSE, "insufficient_quota", None),
    "OpenAI, cap": (429, error("Hard limit", "billing_hard_limit_reached"), {}, PAUSE, "insufficient_quota", None),
    "Azure": (
        429,
        error(
            "Requests have exceeded token rate limit of your tier. Please retry after 8 seconds. /quotaincrease",
            "429",
        ),
        {},
        SLOW,
        "rate_limit",
        8.0,
    ),
    "Gemini, a minute, in a list": (
        429,
        [
            error(
                GEMINI,
                429,
                status="RESOURCE_EXHAUSTED",
                details=[quota_failure("GenerateRequestsPerMinutePerProject"), RETRY_INFO],
            )
        ],
        {},
        SLOW,
        "rate_limit",
        32.0,
    ),
    "Gemini, a day": (
        429,
        [error(GEMINI, 429, status="RESOURCE_EXHAUSTED", details=[quota_failure("GenerateRequestsPerDayPerProject")])],
        {},
        SLOW,
        "quota",
        None,
    ),
    "Gemini, prepaid": (
        429,
        error("Your prepayment credits are depleted.", 429, status="RESOURCE_EXHAUSTED"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "Gemini, bare": (
        429,
        error("Resource has been exhausted (e.g. check quota).", 429, status="RESOURCE_EXHAUSTED"),
        {},
        SLOW,
        "quota",
        None,
    ),
    "Anthropic, a minute": (
        429,
        error("This request would exceed your organization's rate limit", None, "rate_limit_error"),
        {"retry-after": "17"},
        SLOW,
        "rate_limit",
        17.0,
    ),
    "Anthropic, empty": (
        400,
        error("Your credit balance is too low to access the API.", None, "invalid_request_error"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "this vendor": (
        429,
        error("Request rejected by quota policy.", "quota_exceeded", "rate_limit_error"),
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "this vendor, empty": (
        402,
        {"status": {"code": 402, "message": "insufficient credits", "error_code": 40201}, "data": None},
        {},
        PAUSE,
        "payment_required",
        None,
    ),
    "this vendor, empty in a 200": (
        200,
        {"status": {"code": 402, "message": "insufficient credits", "error_code": 40201}, "data": None},
        {},
        PAUSE,
        "payment_required",
        None,
    ),
    "Fireworks, a suspended account": (
        412,
        error("Account a is suspended, possibly due to reaching the monthly spending limit"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "Groq, flex without the setting": (498, error("flex capacity exceeded"), {}, SLOW, "overloaded", None),
    "Google, an error in a message": (
        429,
        error(
            '{"error": {"code": 429, "message": "You exceeded your current quota, please check your plan and billing'
            ' details.", "status": "RESOURCE_EXHAUSTED"}}'
        ),
        {},
        SLOW,
        "quota",
        None,
    ),
    "this vendor, bare text": (403, "insufficient balance", {}, PAUSE, "forbidden", None),
    "this vendor, bare key": (401, "invalid_api_key", {}, PAUSE, "authentication", None),
    "LiteLLM, a key's budget": (
        400,
        error("Budget has been exceeded! Current cost: 10.01, Max budget: 10.0", "400", "budget_exceeded"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "LiteLLM, a team's budget": (
        429,
        error("ExceededBudget: Crossed spend within team. Team over budget. Current spend: 10.2", "429"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "LiteLLM, cooling": (
        429,
        error("No deployments available for selected model, Try again in 60 seconds. Passed model=m.", "429", "None"),
        {},
        SLOW,
        "rate_limit",
        60.0,
    ),
    "a budget for thinking": (400, error("The thinking budget exceeded max_tokens"), {}, ROW, "bad_request", None),
    "Baidu, a wrong token": (
        200,
        {"error_code": 110, "error_msg": "Access token invalid or no longer valid"},
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "a wait without in": (429, error("Please wait 20 seconds before retrying"), {}, SLOW, "rate_limit", 20.0),
    "a wait at least": (429, error("Too many requests. Wait at least 45 seconds."), {}, SLOW, "rate_limit", 45.0),
    "a wait with a colon": (429, error("Too many requests, retry in: 30s"), {}, SLOW, "rate_limit", 30.0),
    "a wait in ms": (429, error("slow down", None, None, retry_after_ms=1500), {}, SLOW, "rate_limit", 1.5),
    "a wait in the metadata": (
        429,
        error("Provider returned error", 429, None, metadata={"retry_after_seconds": 12}),
        {},
        SLOW,
        "rate_limit",
        12.0,
    ),
    "quota with a wait": (429, error("Quota exceeded, check your billing"), {"retry-after": "9"}, SLOW, "quota", 9.0),
    "quota and nothing else": (429, error("Quota exceeded"), {}, SLOW, "quota", None),
    "check quota": (429, {"message": "check quota"}, {}, SLOW, "quota", None),
    "a window, and billing": (429, error("quota exceeded (60s window), billing"), {}, SLOW, "rate_limit", None),
    "a minute, and a plan": (
        429,
        error("You exceeded your 1-minute token quota; check your plan and billing"),
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "zh, a minute, and money": (429, error("每分钟请求次数超限，请充值"), {}, SLOW, "rate_limit", None),
    "zh, TPM, and money": (429, error("已达到TPM限制，请稍后重试或充值"), {}, SLOW, "rate_limit", None),
    "de, a minute": (429, error("Kontingent pro Minute überschritten, billing"), {}, SLOW, "rate_limit", None),
    "ja, a minute": (429, error("1分あたりの上限に達しました billing"), {}, SLOW, "rate_limit", None),
    "ja, empty": (429, error("残高が不足しています"), {}, PAUSE, "insufficient_quota", None),
    "de, empty": (429, error("Ihr Guthaben ist aufgebraucht"), {}, PAUSE, "insufficient_quota", None),
    "a video": (400, error("The video is longer than the 60 seconds limit"), {}, ROW, "bad_request", None),
    "a trial": (429, error("Your free trial has ended."), {}, PAUSE, "insufficient_quota", None),
    "a month, and billing": (429, error("monthly quota exceeded, billing"), {}, PAUSE, "insufficient_quota", None),
    "Mistral": (429, {"message": "Requests rate limit exceeded"}, {}, SLOW, "rate_limit", None),
    "Mistral, tier": (
        429,
        {
            "object": "error",
            "message": "Service tier capacity exceeded for this model.",
            "type": "invalid_request_error",
            "code": "3505",
        },
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "Cohere, a minute": (
        429,
        {"message": "You are using a Trial key, which is limited to 20 API calls / minute."},
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "Cohere, a month": (
        429,
        {"message": "You are using a Trial key, which is limited to 1000 API calls per month."},
        {},
        SLOW,
        "quota",
        None,
    ),
    "Groq, a day": (429, error(GROQ_DAY, "rate_limit_exceeded", "tokens"), {}, PAUSE, "quota", 3552.5),
    "OpenAI, a day": (429, error(OPENAI_DAY, "rate_limit_exceeded", "requests"), {}, SLOW, "quota", None),
    "OpenRouter, a day": (
        429,
        error(
            "Rate limit exceeded: free-models-per-day. Add 10 credits to unlock 1000 free model requests per day", 429
        ),
        {},
        SLOW,
        "quota",
        None,
    ),
    "AWS, a day": (
        400,
        {"__type": "ThrottlingException", "message": "Too many tokens per day, please wait before trying again."},
        {},
        SLOW,
        "quota",
        None,
    ),
    "a day's requests, in short": (429, b"RPD limit reached", {}, SLOW, "quota", None),
    "too many in a day": (429, error("Too many requests today, the daily maximum is 50"), {}, SLOW, "quota", None),
    "a minute, with an offer": (
        429,
        error("Rate limit reached on tokens per minute (TPM). Need more? Move to a monthly plan today.", None),
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "DeepSeek, empty": (
        402,
        error("Insufficient Balance", "invalid_request_error"),
        {},
        PAUSE,
        "payment_required",
        None,
    ),
    "OpenRouter, free": (429, error("Rate limit exceeded: free-models-per-min.", 429), {}, SLOW, "rate_limit", None),
    "OpenRouter, in a 200": (200, error("Insufficient credits", 402), {}, PAUSE, "payment_required", None),
    "xAI, empty": (
        429,
        {
            "code": "exhausted",
            "error": "Your team has used all available credits or reached its monthly spending limit.",
        },
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "Moonshot, empty": (
        429,
        error(
            "Your account is suspended, please check your plan and billing details",
            None,
            "exceeded_current_quota_error",
        ),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "Moonshot, busy": (
        429,
        error("The engine is currently overloaded", None, "engine_overloaded_error"),
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "Zhipu, empty": (429, error("您的账户已欠费，请充值后重试", "1113"), {}, PAUSE, "insufficient_quota", None),
    "Zhipu, at once": (429, error("您当前使用该API的并发数过高", "1302"), {}, SLOW, "rate_limit", None),
    "DashScope, a minute": (
        429,
        {"code": "Throttling.RateQuota", "message": "Requests rate limit exceeded"},
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "DashScope, tokens": (
        429,
        {"code": "Throttling.AllocationQuota", "message": "Allocated quota exceeded"},
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "MiniMax, empty": (
        200,
        {"base_resp": {"status_code": 1008, "status_msg": "insufficient balance"}, "choices": None},
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "MiniMax, a minute": (
        200,
        {"base_resp": {"status_code": 1002, "status_msg": "rate limit"}},
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "AWS": (
        400,
        {"__type": "com.amazonaws#ThrottlingException", "message": "Too many tokens, please wait"},
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "Google, the key": (
        400,
        [error("API key not valid. Please pass a valid API key.", 400, status="INVALID_ARGUMENT")],
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "Google, the key, by its details alone": (
        400,
        [error("Bad request", 400, status="INVALID_ARGUMENT", details=[{"reason": "API_KEY_INVALID"}])],
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "Anthropic, the key": (
        400,
        {"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}},
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "DeepSeek, the key": (
        400,
        error("Authentication Fails (no such user)", None, "invalid_request_error"),
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "LiteLLM, the key": (
        400,
        error("Authentication Error, Invalid proxy server token passed.", "400", "auth_error"),
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "a gateway whose upstream key is wrong": (
        500,
        error("Incorrect API key provided", "invalid_api_key", "one_api_error"),
        {},
        PAUSE,
        "authentication",
        None,
    ),
    "DashScope, arrears": (
        400,
        error("Access denied, please make sure your account is in good standing.", "Arrearage", "Arrearage"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "an overdue account": (
        400,
        error("Access denied due to overdue account"),
        {},
        PAUSE,
        "insufficient_quota",
        None,
    ),
    "LM Studio, a crash": (
        400,
        {"error": "The model has crashed without additional information. (Exit code: null)"},
        {},
        FREE,
        "server_error",
        None,
    ),
    "LM Studio, taken from memory": (400, {"error": "Model unloaded."}, {}, FREE, "server_error", None),
    "OpenRouter, a provider's limit": (
        429,
        error("Provider returned error", 429, metadata={"raw": "z-ai/glm is rate-limited upstream. Please retry"}),
        {},
        SLOW,
        "rate_limit",
        None,
    ),
    "HF": (503, {"error": "Model org/name is currently loading", "estimated_time": 20.5}, {}, SLOW, "overloaded", 20.5),
    "nginx": (429, b"<html>429 Too Many Requests, see billing</html>", {}, SLOW, "rate_limit", None),
    "plain": (429, b"quota exceeded", {}, SLOW, "quota", None),
}


@pytest.mark.parametrize("case", LIMITS.values(), ids=LIMITS.keys())
def test_quotas_wait_and_empty_accounts_pause(
    case: tuple[int, object, dict[str, str], Verdict, str, float | None],
) -> None:
    status, said, headers, verdict, kind, wait_s = case
    judgement = judged(status, said, headers)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind, judgement.retry_after_s) == (verdict, kind, wait_s)
    assert judgement.error.http_status == (429 if kind in ("rate_limit", "quota") else status)


TOO_LARGE = error(
    "Request too large for gpt-4 on tokens per min (TPM): Limit 10000, Requested 20000. The input or output tokens "
    "must be reduced in order to run successfully.",
    "rate_limit_exceeded",
)

ROWS_OWN: dict[str, tuple[int, object]] = {
    "a parameter": (400, error("Unknown parameter: 'safety_identifier'.", "unknown_parameter")),
    "a type": (400, error("Invalid value for messages[0].content: expected a string")),
    "too long": (400, error("This model's maximum context length is 8192 tokens.", "context_length_exceeded")),
    "FastAPI": (
        422,
        {"detail": [{"loc": ["body", "top_k"], "msg": "Extra inputs are not permitted", "type": "extra"}]},
    ),
    "a token": (400, error("Invalid token at position 5")),
    "OpenAI, larger than a minute's tokens": (429, TOO_LARGE),
    "the same with a 400": (400, TOO_LARGE),
    "the same inside a 200, as a stream has it": (200, TOO_LARGE),
    "Groq, larger than a minute's tokens": (
        429,
        error(
            "Request too large for model `m` on tokens per minute (TPM): Limit 6000, Requested 9000, please "
            "reduce your message size and try again.",
            "rate_limit_exceeded",
        ),
    ),
}


@pytest.mark.parametrize("case", ROWS_OWN.values(), ids=ROWS_OWN.keys())
def test_an_invalid_request_blames_its_row(case: tuple[int, object]) -> None:
    judgement = judged(*case)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind, judgement.filtered) == (ROW, "bad_request", False)


# -- what they say

WORDS: dict[str, tuple[object, str | None, str]] = {
    # body, code, message
    "OpenAI": (error("No.", "c", "t"), "c", "No."),
    "with a parameter": ({"error": {"message": "Unknown.", "param": "top_k"}}, None, "Unknown. (param: top_k)"),
    "text and message": ({"error": "Forbidden", "message": "Not yours"}, "Forbidden", "Not yours"),
    "text and code": ({"error": "Not yours", "code": "x"}, "x", "Not yours"),
    "text and type": ({"error": "Not yours", "error_type": "x"}, "x", "Not yours"),
    "text alone": ({"error": "Not yours"}, None, "Not yours"),
    "bare text": ("invalid_api_key", None, "invalid_api_key"),
    "OAuth": ({"error": "invalid_token", "error_description": "It expired"}, "invalid_token", "It expired"),
    "the vendor's envelope": (
        {"status": {"code": 402, "message": "No.", "error_code": 40201}, "data": None},
        "40201",
        "No.",
    ),
    "FastAPI": ({"detail": "No."}, None, "No."),
    "FastAPI, a list": (
        {
            "detail": [
                {"loc": ["body", "a"], "msg": "Required", "type": "missing"},
                {"loc": ["body", 0], "msg": "No", "type": "x"},
            ]
        },
        "missing",
        "body.a: Required; body.0: No",
    ),
    "FastAPI, an object": ({"detail": {"error": "No.", "code": 5}}, "5", "No."),
    "AWS": ({"__type": "com.amazon.x#ValidationException", "message": "No."}, "ValidationException", "No."),
    "AWS, capital": ({"Message": "No."}, None, "No."),
    "Google": ([error("No.", 429, status="RESOURCE_EXHAUSTED")], "429", "No."),
    "OpenRouter": (error("Provider error", 429, metadata={"raw": "No."}), "429", "Provider error: No."),
    "RFC 9457": ({"type": "https://h/e", "title": "Out", "status": 402, "detail": "No."}, "https://h/e", "Out: No."),
    "MiniMax": ({"base_resp": {"status_code": 1008, "status_msg": "No."}}, "1008", "No."),
    "Baidu": ({"error_code": 17, "error_msg": "No."}, "17", "No."),
    "Tencent": ({"Response": {"Error": {"Code": "A.B", "Message": "No."}, "RequestId": "r"}}, "A.B", "No."),
    "Apigee": ({"fault": {"faultstring": "No.", "detail": {"errorcode": "x.y"}}}, None, "No."),
    "Cohere": ({"message": "No."}, None, "No."),
    "Anthropic": (
        {"type": "error", "error": {"type": "overloaded_error", "message": "No."}},
        "overloaded_error",
        "No.",
    ),
    "a list of errors": ({"errors": [{"message": "No.", "code": 1}, "Nor that"]}, "1", "No.; Nor that"),
    "wrapped twice": ({"error": {"error": {"message": "No.", "code": "c"}}}, "c", "No."),
    "Lambda": ({"errorType": "T", "errorMessage": "No."}, "T", "No."),
}


@pytest.mark.parametrize("case", WORDS.values(), ids=WORDS.keys())
def test_every_envelope_gives_its_code_and_its_message(case: tuple[object, str | None, str]) -> None:
    said, code, message = case
    answer = parse(json.dumps(said).encode())
    assert (answer.completion, answer.error_code, answer.error_message) == (False, code, message)


def test_an_error_saying_success_is_no_failure() -> None:
    fine: list[dict[str, Any]] = [
        {"base_resp": {"status_code": 0, "status_msg": ""}},
        {"status": {"code": 200, "message": "success"}},
        {"status": "ok", "detail": "done"},
        {"code": 0, "detail": "x"},
    ]
    for more in fine:
        assert parse(body(**more)).completion
        assert parse(body(**more)).error_message is None
    assert parse(b'{"base_resp":{"status_code":0,"status_msg":"success"}}').error_message is None


# -- in the midst of an answer

BROKEN = {"code": 502, "message": "Provider disconnected"}


@pytest.mark.parametrize("reason", ["error", "abort", "network_error", "insufficient_system_resource", "ERROR"])
def test_a_failed_choice_is_no_answer(reason: str) -> None:
    choice = {"index": 0, "message": {"content": "Fi"}, "finish_reason": reason}
    for raw in (
        body(choices=[choice]),
        stream(chunk({"content": "Fi"}), chunk(choices=[{"index": 0, "delta": {}, "finish_reason": reason}])),
    ):
        judgement = judged(200, raw)
        assert judgement.verdict is MAYBE
        assert judgement.error is not None
        assert (judgement.error.kind, judgement.error.code) == ("error_in_answer", reason)
        assert reason in (judgement.error.message or "")
        assert parse(raw).content == "Fi"


@pytest.mark.parametrize("reason", ["error", "stop", None])
@pytest.mark.parametrize(("code", "verdict"), [(502, MAYBE), (429, SLOW), ("server_error", MAYBE), (None, MAYBE)])
def test_an_error_in_a_choice_counts(reason: str | None, code: object, verdict: Verdict) -> None:
    broken = {**BROKEN, "code": code}
    choice = {"index": 0, "message": {"content": "Fi"}, "finish_reason": reason, "error": broken}
    last = {"index": 0, "delta": {"content": ""}, "finish_reason": reason, "error": broken}
    for raw in (body(choices=[choice]), stream(chunk({"content": "Fi"}), chunk(choices=[last]))):
        judgement = judged(200, raw)
        assert judgement.verdict is verdict
        assert judgement.error is not None
        assert judgement.error.message == "Provider disconnected"


GLUED = [
    b"data: [DONE]",
    b"\n\ndata: [DONE]\n\n",
    b"[DONE]",
    b"\r\n0\r\n\r\ndata:[DONE]\r\n",
    b"\n: bye\ndata: [DONE]\0",
]


@pytest.mark.parametrize("tail", GLUED)
@pytest.mark.parametrize("head", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_glued_stream_end_is_ignored(tail: bytes, head: bytes) -> None:
    answer = parse(head + body() + tail)
    assert (answer.completion, answer.content, answer.flagged) == (True, "Fine.", True)
    assert judged(200, head + body() + tail).verdict is OK


@pytest.mark.parametrize(
    "raw",
    [
        body() + b"event:0\n:" * 50_000 + b"\nx [DONE]",  # and it takes no time
        body()[:-1] + b"data: [DONE]",
        body() + b"x data: [DONE]",
        body() + b'{"error":"gone"}data: [DONE]',
        body() + b'data: {"error":"gone"}\n\ndata: [DONE]',
    ],
)
def test_a_stream_end_completes_nothing(raw: bytes) -> None:
    assert judged(200, raw).verdict is MAYBE
