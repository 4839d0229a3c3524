"""The subject of a refusal by its words: content, an empty account, a pace, a quota, the key, a parameter. PURE.

Vendors share status codes and differ in words, so the words decide where a status does not (policy.RULES). Each pattern
names the vendors whose bodies it was drawn from; tests/unit/test_refusals.py has those bodies.
"""

import re
from collections.abc import Mapping
from enum import StrEnum

from batchrun.patterns import Pattern


class Subject(StrEnum):
    CONTENT = "content"
    """The question or answer was blocked for what it says."""
    BROKE = "broke"
    """No money is left, in words that mean nothing else."""
    ACCOUNT = "account"
    """Money or a plan is mentioned; alone it means an empty account, beside a pace it is an offer to buy more."""
    QUOTA = "quota"
    """A quota is used up: a minute's or a month's."""
    DAY = "day"
    """A limit of a day or a month. Its other words may be those of a pace, but it may last longer than a run."""
    PACE = "pace"
    """A limit that time alone lifts within minutes."""
    WINDOW = "window"
    """So many seconds or minutes, which in a 429 are those of a limit."""
    WAIT = "wait"
    """The server says how long to wait, or uses the name of a passing limit (`RESOURCE_EXHAUSTED`)."""
    KEY = "key"
    """The key is wrong."""
    UNABLE = "unable"
    """The server can't do this at all."""
    CAPACITY = "capacity"
    """The server has no room for this now; of a service tier that serves only while there is room."""
    CRASHED = "crashed"
    """The server's own machinery failed: the model crashed, or was taken out of memory."""
    TOO_LARGE = "too large"
    """This one request is larger than the limit itself: no wait makes room for it."""


_I = re.IGNORECASE

_PATTERNS: Mapping[Subject, Pattern] = {
    # DeepSeek, OpenRouter, MiniMax 1008, Zhipu 1113 (arrears), Anthropic ("credit balance is too low", with a 400), xAI
    # ("used all available credits or reached its monthly spending limit"), Moonshot ("account is suspended"), LiteLLM
    # ("Budget has been exceeded!", "budget_exceeded", "ExceededTokenBudget", with a 400), DashScope ("Arrearage", "make
    # sure your account is in good standing", with a 400)
    Subject.BROKE: Pattern(
        r"(insufficient|not enough|no|low|exhausted|depleted|out of)[ _-](account[ _-]|prepaid[ _-])?"
        r"(balance|credits?|funds?|money)\b"
        r"|(balance|credits?|funds)\b.{0,20}\b(too low|insufficient|exhausted|depleted|used up|not enough|run out)"
        r"|used all (available |your )?credits|spend(ing)?[ _-]limit|(billing|spend)[ _-]hard[ _-]limit|arrear"
        r"|good standing|\boverdue[ _-](account|payment|balance|bill|invoice)"
        r"|(account|organization|team|project)\b.{0,40}\b(suspended|deactivated|overdue|past due)"
        r"|(?<!thinking )(?<!reasoning )(?<!token )\bbudget[ _](has been )?exceeded|\bover budget\b"
        r"|exceeded(token)?budget"
        r"|payment[ _-](is[ _-])?required|(trial|subscription)\b.{0,12}\b(ended|expired)"
        r"|\u4f59\u989d\u4e0d\u8db3|\u6b20\u8d39|残高(が)?不足|잔액.{0,4}부족|guthaben.{0,30}(aufgebraucht|erschöpft)"
        r"|(solde|saldo|crédito?s?) (est |es |é )?insuf",
        _I,
    ),
    Subject.ACCOUNT: Pattern(
        r"insufficient[_ ]quota|credits?\b|\bbalance|billing|spend|payment|prepaid|recharge|top[ -]?up\b|arrear"
        r"|(check|upgrade) your plan|purchase|\u5145\u503c",
        _I,
    ),
    # MiniMax 2056 ("usage limit exceeded": a plan's five hours)
    Subject.QUOTA: Pattern(r"quota(?!increase)|allowance|usage[ _-]limit", _I),
    # OpenAI ("Rate limit reached ... on requests per day (RPD)"), Groq (TPD), OpenRouter ("free-models-per-day"), AWS
    # ("Too many tokens per day"), Google ("GenerateRequestsPerDayPerProject")
    Subject.DAY: Pattern(
        r"(per|/|every|each) ?[ _-]?(day|month)(?!s)|\b(daily|monthly)\b(?! (plan|subscription|billing|fee))"
        r"|(?<![a-z])[rtq]pd(?![a-z])"
        r"|\b(requests|calls|tokens|limit|quota|for) today\b|\btomorrow\b|\b(24|twenty-four)[ -]?h(ou)?rs?\b"
        r"|每(一|1)?(日|天|月)|日あたり|하루|일일"
        r"|\b(pro|par|por|al|в) (tag|jour|d[ií]a|giorno|день)\b|\btages(limit|kontingent)",
        _I,
    ),
    # OpenAI, Azure, Groq (TPM, RPM), Cohere ("20 API calls / minute"), Google ("PerMinute", with 400 AWS throttling),
    # Mistral ("Requests rate limit exceeded"), Zhipu 1302 and 1305 (concurrency), DashScope ("Throttling.RateQuota")
    Subject.PACE: Pattern(
        r"rate[ _-]?limit|ratequota|too[ _-]?many[ _-]?(concurrent[ _-]?|api[ _-]?)?(requests|calls|tokens)"
        r"|(per|/|every|each) ?[ _-]?(second|minute|min|hour)(?![a-z])|(?<![a-z])[rtq]p[ms](?![a-z])"
        r"|per(second|minute|hour)|throttl|slow[ _-]?down|too fast|concurren|requests? (frequency|limit)"
        r"|minute.{0,10}(limit|quota)"
        r"|\u901f\u7387|\u5e76\u53d1|\u9891\u7387|每(一|1)?(秒|分|小时)|限流|频繁|请求(次数|过多|过快)"
        r"|分あたり|秒あたり|분당|초당",
        _I,
    ),
    # "quota exceeded (60s window)", "1-minute token quota"; a 400 may say so of a video that is too long
    Subject.WINDOW: Pattern(
        r"\b\d+[ -]?(s|secs?|seconds?|mins?|minutes?)\b.{0,12}\b(window|quota|limit|interval|period)"
        r"|\b(window|quota|limit|interval|period)\b.{0,12}\b\d+[ -]?(secs?|seconds?|mins?|minutes?)\b"
        r"|\b(pro|par|por|al|je|в) (sekunde|minut|segundo|seconde|secondo|секунд|минут)|分钟|分間",
        _I,
    ),
    Subject.WAIT: Pattern(r"resource[ _-]?exhausted|rate_limit_error", _I),
    # Google answers a wrong key with 400, "API key not valid. Please pass a valid API key."; Anthropic's is the
    # "x-api-key", Azure's the "subscription key", LiteLLM's the "proxy server token", DeepSeek's "Authentication Fails"
    Subject.KEY: Pattern(
        r"(invalid|incorrect|expired|missing|wrong|bad|no)[ _-]"
        r"((x-)?api[ _-]?|access[ _-]?|auth\w*[ _-]|subscription |proxy server )(key|token)\b"
        r"|(api[ _-]?key|(access|auth\w*)[ _-]token)[ _-](is[ _-])?(not[ _-]valid|invalid|expired|missing|incorrect)"
        r"|invalidapikey|\bauthentication[ _](error|fails)\b",
        _I,
    ),
    # llama.cpp sends this with a 500 for what its model can't do, such as images: a retry fails again
    Subject.UNABLE: Pattern(r"\bnot (supported|implemented)\b|\bunsupported\b", _I),
    # LM Studio sends this with a 400: "The model has crashed without additional information", "Model unloaded."
    Subject.CRASHED: Pattern(r"\bmodel (has |was |is )?(been )?(crashed|unloaded|reloaded)\b|\bchannel error\b", _I),
    # OpenAI's flex processing ("Resource Unavailable"), Groq's (498, "capacity_exceeded")
    Subject.CAPACITY: Pattern(
        r"resource[ _-]?unavailable|capacity[ _-]?exceeded"
        r"|\b(no|not enough|insufficient|lack of|lacks|out of|exceed(s|ed)?|at|limited|without)\b.{0,30}\bcapacity\b"
        r"|\bcapacity\b.{0,30}\b(unavailable|not available|exhausted|full|limited)",
        _I,
    ),
    # OpenAI, with a 429 in the words of a pace: "Request too large for ... on tokens per min (TPM): Limit 10000,
    # Requested 20000. The input or output tokens must be reduced"; Groq: "please reduce your message size and
    # try again". Anthropic's is of the pace: "Please reduce the prompt length or the maximum tokens requested, or try
    # again later"
    Subject.TOO_LARGE: Pattern(
        r"\b(request|prompt|input|message|context)s?[ _](is[ _]|was[ _])?too[ _](large|long|big)\b"
        r"|\btokens must be reduced|\breduce (your|the) (message|prompt|input|context|length|request size)\b"
        r"(?!.{0,80}\b(or (try|retry|wait)\b|(try again|retry) (later|in|after)\b))"
        r"|context[ _]length[ _]exceeded|maximum context length",
        _I,
    ),
}

_URL = Pattern(r"https?://[^\s\"'<>)\]]*", _I)
"""Not searched for words: errors of an outage may also link to a page on policies."""

_JUDGED = Pattern(
    r"content[ _-]?(management[ _-]?|filtering[ _-]?)?polic(y|ies)"
    r"|(content|usage|safety|use|community|moderation)[ _-]?(policy|policies|guidelines?|violations?)"
    r"|violat\w*.{0,60}\b(polic|guideline|terms)|policy[ _-]?violation"
    r"|content exists risk|flagged (by|as|for|in)|responsible[ _-]?ai|prohibited[ _-]?content|data[ _-]?inspection"
    r"|(was|were|been|is|are) (blocked|flagged|filtered|rejected|moderated)\b.{0,40}(safety|moderation|content|polic)"
    # Chinese, Japanese, Korean
    r"|敏感|违规|違規|内容安全|不安全|不当内容|违反.{0,12}(政策|规定|法)|审核未通过|(コンテンツ|ポリシー|規約|ガイドライン).{0,20}違反"
    r"|不適切|有害|コンテンツ.{0,20}(ブロック|フィルタ|拒否)|정책.{0,8}위반|위반.{0,12}정책|유해|부적절|(콘텐츠|내용).{0,20}차단"
    # French, German, Spanish, Portuguese, Italian, Russian
    r"|contenus?\b.{0,40}(bloqu|inappropri|interdit|sensible|filtr|viol|refus)"
    r"|(bloqu|viol|enfrei|contraire|refus)\w*.{0,40}(mod[ée]ration|contenu|conditions d)"
    r"|inhalte?s?\b.{0,40}(verst|blockiert|gesperrt|unangemessen|unzul|gefiltert|abgelehnt)"
    r"|verst(o|ö|oe)(ß|ss)\w*.{0,40}(richtlinie|inhalt|bedingung)"
    r"|(pol[ií]tica|normas)\w* de (contenido|uso|modera|conte[uú]do)"
    r"|(contenido|conte[uú]do|contenuto?)\w*\b.{0,40}(bloq|blocc|inap|inad|prohib|proib|vietat|filtrad|rechaz|viola|infring)"
    r"|(infring|viola|incumpl)\w*.{0,40}(pol[ií]tic|normas|norme|linee guida|diretrizes|contenido|conte[uú]do)"
    r"|контент.{0,40}(заблок|запрещ|наруша)|наруша.{0,40}(политик|правил)|недопустим",
    _I,
)
"""A judgement on the text. `content_policy` is the vendor's own name for it."""

_OF_CONTENT = Pattern(
    r"content[ _-]?(filter|moderation|safety|inspection|check|blocked|violation|restrict|not allowed|risk)"
    r"|moderat(ion|ed)\b|\bsafety\b|safety[ _](block|filter|check|system|reason)|\bflagged\b|\bprohibited\b|\bblocked\b"
    r"|inappropriate|(\b|_)sensitive\b|\bharmful\b|\bnsfw\b|\btoxic|profan|obscen|\bsexual|\bviolen(ce|t)|hate speech"
    r"|self[- ]harm|jailbreak|guardrail|disallowed|\bcsam\b",
    _I,
)
"""Words of content, which a broken filter or a blocked address may use as well."""

_OUT_OF_ORDER = Pattern(
    r"(?<!content is )\bunavailable|overload|capacity|\bbusy\b|tempor(ar|al|ai|än|anea)|time[ds]?[ _-]?out|maintenance"
    r"|unreachable|out of memory|circuit|backpressure|\bsla\b|deprecat|\bmethod\b"
    r"|\bfor \d+ ?(ms|milliseconds|s|seconds)\b"
    r"|fail(ed|s|ure)? to (respond|connect|load|start|reach|answer|return)"
    r"|no (available |allowed )?(endpoint|provider|instance|server|worker)"
    # a policy for machines
    r"|\b(network|pod|security|authori[sz]ation|access|routing|latency|memory|data|admission|load|retry|cache|rate|egress"
    r"|shedding|scheduling|placement|resource|privacy|cors|origin|quota) (usage )?(polic|guideline)|\brbac\b"
    # a blocked account or address, not a blocked text
    r"|\b(account|organi[sz]ation|team|project|region|country|location|access|address|ip|key|token|deployment|host|model"
    r"|thread|loop|queue|pool|worker|process|port)s? ((has|have) )?(is|are|was|were|been|being|got|gets|remains?) "
    r"(temporarily )?(blocked|flagged|suspended|restricted|banned|disabled)"
    r"|\b(account|access|region|country|ip)( \w+)? (blocked|banned|denied)|\b(io|event|thread)\b.{0,12}\bblocked"
    # Chinese, Japanese, Korean
    r"|暂时|不可用|超时|繁忙|稍后|过载|维护|故障|检测失败|负载|無法使用|一時的|利用でき|利用いただけ|タイムアウト|過負荷|混雑"
    r"|メンテナンス|障害|後ほど|일시적|사용할 수 없|시간 초과|과부하|점검 중|잠시 후|혼잡"
    # French, German, Spanish, Portuguese, Italian, Russian
    r"|indispon|surcharg|nicht (verfügbar|erreichbar)|überlast|vorübergehend|zeitüberschreitung|wartungsarbeit"
    r"|ausgelastet|no (est[áa] )?disponible|não (está )?disponível|non disponibile|sobrecarg|sovraccaric|mantenimiento"
    r"|manutenzione|tiempo de espera|недоступ|перегруж|временно",
    _I,
)
"""Words that only a broken server uses, or one that refuses an account, an address or a connection. They outweigh words
of content: to send a blocked row again costs little, an outage mistaken for a content refusal loses answers.
"""

_OF_TROUBLE = Pattern(
    r"unavailable|upstream|\b(un)?health(y|[ -]check)|breaker|worker|engine|\bnodes?\b|backend|gateway|disconnect"
    r"|connection|to connect|loading|start(ing|up)|warm|crash|\bdead\b|\bdied\b|\bdown\b|\bcuda|\bgpu|shard|replica"
    r"|\bqueue|shut|restart|scal(e|ing)|throttl|rate.?limit|\bip\b|firewall|cloudflare|\bwaf\b|\bbots?\b"
    r"|internal (server )?error|not (ready|loaded|found)|fail(ed|s|ure)? to get"
    r"|load (balanc|shed)|too many|retry|routing|\bthreads?\b|\bloop\b|\bhosts?\b|concurren|scheduled|delet"
    r"|\bregions?\b|\baccount\b|not supported|unsupported|\bquota\b|\bsessions?\b|\bservice returned\b",
    _I,
)
"""Words of machinery, which a refusal for content has no use for, but a judgement on it may have."""


def speaks_of(subject: Subject, words: str) -> bool:
    """True when the words are about this. Of content they are only if nothing in them speaks of broken machinery."""
    words = _URL.sub(" ", words)
    if subject is not Subject.CONTENT:
        return _PATTERNS[subject].search(words) is not None
    if _OUT_OF_ORDER.search(words):
        return False
    return _JUDGED.search(words) is not None or (
        _OF_CONTENT.search(words) is not None and _OF_TROUBLE.search(words) is None
    )
