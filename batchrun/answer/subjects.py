"""What the words of a refusal speak of: content, an empty account, a pace, a quota, the key, a parameter. PURE.

Vendors share status codes and differ in words, so the words decide where a status does not (policy.RULES). Each pattern
stands beside the vendors whose bodies it was drawn from; tests/test_refusals.py has those bodies.
"""

import re
from collections.abc import Mapping
from enum import StrEnum


class Subject(StrEnum):
    CONTENT = "content"
    """The question or answer was blocked for what it says."""
    BROKE = "broke"
    """There is no money left, in words that mean nothing else."""
    ACCOUNT = "account"
    """Money or a plan is mentioned; alone it means an empty account, beside a pace it is an offer to buy more."""
    QUOTA = "quota"
    """A quota is used up: a minute's or a month's."""
    PACE = "pace"
    """A limit that time alone lifts within minutes."""
    WAIT = "wait"
    """The server says how long to wait, or uses the name of a passing limit (`RESOURCE_EXHAUSTED`)."""
    KEY = "key"
    """The key is wrong."""
    UNABLE = "unable"
    """The server can't do this at all."""
    TOO_LARGE = "too large"
    """This one request is larger than the limit itself: no wait makes room for it."""


_I = re.IGNORECASE

_PATTERNS: Mapping[Subject, re.Pattern[str]] = {
    # DeepSeek, OpenRouter, MiniMax 1008, Zhipu 1113 (arrears), Anthropic ("credit balance is too low", with a 400), xAI
    # ("used all available credits or reached its monthly spending limit"), Moonshot ("account is suspended")
    Subject.BROKE: re.compile(
        r"(insufficient|not enough|no|low|exhausted|depleted|out of)[ _-](account[ _-]|prepaid[ _-])?"
        r"(balance|credits?|funds?|money)\b"
        r"|(balance|credits?|funds)\b.{0,20}\b(too low|insufficient|exhausted|depleted|used up|not enough|run out)"
        r"|used all (available |your )?credits|spend(ing)?[ _-]limit|(billing|spend)[ _-]hard[ _-]limit|arrears?\b"
        r"|(account|organization|team|project)\b.{0,40}\b(suspended|deactivated|overdue|past due)"
        r"|payment[ _-](is[ _-])?required|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39",
        _I,
    ),
    Subject.ACCOUNT: re.compile(
        r"insufficient[_ ]quota|credits?\b|\bbalance|billing|spend|payment|prepaid|recharge|top[ -]?up\b|arrear"
        r"|(check|upgrade) your plan|purchase|\u5145\u503c",
        _I,
    ),
    Subject.QUOTA: re.compile(
        r"quota(?!increase)|allowance|per[ _-]?(day|month)\b|(daily|monthly)\b.{0,20}\blimit", _I
    ),
    # OpenAI, Azure, Groq (TPM, RPM), Cohere ("20 API calls / minute"), Google ("PerMinute", with 400 AWS throttling),
    # Mistral ("Requests rate limit exceeded"), Zhipu 1302 and 1305 (concurrency), DashScope ("Throttling.RateQuota")
    Subject.PACE: re.compile(
        r"rate[ _-]?limit|ratequota|too[ _-]?many[ _-]?(concurrent[ _-]?|api[ _-]?)?(requests|calls|tokens)"
        r"|(per|/|every|each) ?[ _-]?(second|minute|min|hour)(?![a-z])|\b[rtq]p[ms]\b|per(second|minute|hour)"
        r"|throttl|slow[ _-]?down|too fast|concurren|requests? (frequency|limit)|minute.{0,10}(limit|quota)"
        r"|\u901f\u7387|\u5e76\u53d1|\u9891\u7387",
        _I,
    ),
    Subject.WAIT: re.compile(r"resource[ _-]?exhausted|rate_limit_error", _I),
    # Google answers a wrong key with 400, "API key not valid. Please pass a valid API key."
    Subject.KEY: re.compile(
        r"(invalid|incorrect|expired|missing|wrong|bad|no)[ _-](api[ _-]?|access[ _-]?|auth\w*[ _-])(key|token)\b"
        r"|api[ _-]?key[ _-](is[ _-])?(not[ _-]valid|invalid|expired|missing|incorrect)|invalidapikey",
        _I,
    ),
    # llama.cpp says so with a 500 of what its model can't do, such as images: to ask again is in vain
    Subject.UNABLE: re.compile(r"\bnot (supported|implemented)\b|\bunsupported\b", _I),
    # OpenAI, with a 429 in the words of a pace: "Request too large for ... on tokens per min (TPM): Limit 10000,
    # Requested 20000. The input or output tokens must be reduced"; Groq: "please reduce your message size"
    Subject.TOO_LARGE: re.compile(
        r"\b(request|prompt|input|message|context)s?[ _](is[ _]|was[ _])?too[ _](large|long|big)\b"
        r"|\btokens must be reduced|\breduce (your|the) (message|prompt|input|context|length|request size)"
        r"|context[ _]length[ _]exceeded|maximum context length",
        _I,
    ),
}

_JUDGED = re.compile(
    r"content[ _-]?(management[ _-]?)?polic(y|ies)|(content|usage|safety|use|community|moderation)[ _-]?"
    r"(policy|policies|guidelines?|violations?)|violat\w*.{0,60}\b(polic|guideline|terms)|policy[ _-]?violation"
    r"|flagged (by|as|for|in)|responsible[ _-]?ai|prohibited[ _-]?content|data[ _-]?inspection"
    r"|(was|were|been|is|are) (blocked|flagged|filtered|rejected|moderated)\b.{0,40}(safety|moderation|content|polic)"
    r"|\u654f\u611f|\u8fdd\u89c4|\u5185\u5bb9\u5b89\u5168",
    _I,
)
"""A judgement on what was said: no outage words it so. `content_policy` is the vendor's own name for it."""

_OF_CONTENT = re.compile(
    r"content[ _-]?(filter|moderation|safety|inspection|check|blocked|violation|restrict|not allowed|risk)"
    r"|moderat(ion|ed)\b|\bsafety\b|safety[ _](block|filter|check|system|reason)|\bflagged\b|\bprohibited\b|\bblocked\b"
    r"|inappropriate|\bsensitive\b|\bharmful\b|\bnsfw\b|\btoxic|profan|obscen|\bsexual|\bviolen(ce|t)|hate speech"
    r"|self[- ]harm|jailbreak|guardrail|disallowed",
    _I,
)
"""Words of content, which a broken filter or a blocked address may use as well."""

_OF_TROUBLE = re.compile(
    r"unavailable|overload|capacity|busy|temporar|time[ds]?[ _-]?out|upstream|\b(un)?health(y|[ -]check)|circuit"
    r"|breaker|worker|engine|\bnodes?\b|backend|gateway|disconnect|connection|to connect|unreachable|maintenance"
    r"|loading|start(ing|up)|warm|crash|\bdead\b|\bdied\b|\bdown\b|out of memory|\bcuda|\bgpu|shard|replica"
    r"|\bqueue|shut|restart|scal(e|ing)|throttl|rate.?limit|\bip\b|firewall|cloudflare|\bwaf\b|\bbots?\b"
    r"|internal (server )?error|not (ready|loaded|found)"
    r"|fail(ed|s|ure)? to (respond|connect|load|start|reach|get|answer|return)"
    r"|no (available )?(instance|server)|load (balanc|shed)|too many|retry|routing",
    _I,
)
"""Words of machinery, which a refusal for content has no use for."""


def speaks_of(subject: Subject, words: str) -> bool:
    """True when the words are about this. Of content they are only if nothing in them speaks of broken machinery."""
    if subject is not Subject.CONTENT:
        return _PATTERNS[subject].search(words) is not None
    if _JUDGED.search(words):
        return True
    return _OF_CONTENT.search(words) is not None and _OF_TROUBLE.search(words) is None
