"""Findings: unusual things in a job's newest run, each with its figures, a threshold and advice. PURE."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from batchrun.errors import JobError
from batchrun.report.drift import figures
from batchrun.report.latencies import percentile
from batchrun.report.profile import Profile
from batchrun.report.runs import Account
from batchrun.report.wording import are, plural

THRESHOLDS: dict[str, float] = {
    "one_value": 0.60,
    "cut": 0.02,
    "invalid": 0.05,
    "length": 0.25,
    "identical": 0.05,
    "cost": 0.25,
    "cache": 0.10,
    "retries": 0.05,
    "model": 0.0,
    "unfinished": 0.0,
    "unpriced": 0.0,
}
"""Finding → the share above which it is reported. docs/cost.md says what the share is of."""

CACHED_FROM = 1_024
"""Tokens from which providers keep a prefix (their pages on prompt caching, 2026-11)."""

FEW_ROWS = 20
"""With fewer rows a share means little, and is not reported."""


class Finding(msgspec.Struct, frozen=True):
    """One finding. `--finding name=off` mutes it. `text` is what is unusual."""

    name: str
    job: str
    run_id: str
    text: str
    advice: str


class Night(msgspec.Struct, frozen=True):
    """One run with its rows' profile; None if its rows can't be read."""

    account: Account
    profile: Profile | None


def thresholds(settings: Sequence[str]) -> dict[str, float]:
    """The thresholds after settings such as `retries=0.1`. `retries=off` mutes one finding, `off` all of them.

    Raises:
        JobError: an unknown finding, or not a number.
    """
    found = dict(THRESHOLDS)
    for setting in settings:
        name, _, value = setting.partition("=")
        if setting == "off":
            found.clear()
            continue
        if name not in THRESHOLDS:
            raise JobError(f"--finding {setting}: expected NAME=SHARE or NAME=off; names are {', '.join(THRESHOLDS)}")
        if value == "off":
            found.pop(name, None)
            continue
        try:
            found[name] = float(value)
        except ValueError as error:
            raise JobError(f"--finding {setting}: {value!r} is not a number") from error
        if not 0 <= found[name] <= 1_000:
            raise JobError(f"--finding {setting}: expected a share of 0 or more")
    return found


def findings(now: Night, before: Sequence[Night], limits: Mapping[str, float]) -> list[Finding]:
    """The findings in `now`. `before` are the job's earlier nights, the newest first."""
    return [
        Finding(name, now.account.job, now.account.run_id, text, advice)
        for name, find in _FINDERS.items()
        if name in limits
        for text, advice in find(now, before, limits[name])
    ]


_Found = Iterator[tuple[str, str]]


def _before(nights: Sequence[object]) -> str:
    return "the night before" if len(nights) == 1 else f"the {len(nights)} nights before"


def _one_value(now: Night, before: Sequence[Night], limit: float) -> _Found:
    profile = now.profile
    if profile is None or profile.rows < FEW_ROWS:
        return
    for name, field in (("content", profile.contents), *profile.fields.items()):
        known = field.rows - field.nulls
        if known < FEW_ROWS or not field.values:
            continue
        value, count = field.values.most_common(1)[0]
        if count / known > limit:
            shown = value if len(value) <= 60 else value[:60] + "…"
            yield (
                f"{name} is {shown!r} in {count / known:.0%} of {known:,} answers",
                "check a few of those rows: the prompt may ask nothing, or the input may always be the same",
            )


def _cut(now: Night, before: Sequence[Night], limit: float) -> _Found:
    for status, advice in (
        ("truncated", "raise request.max_tokens, and retry them: --retry-failed --status truncated"),
        ("filtered", "check the rows: batchrun show DIR --status filtered"),
        ("refused", "check the rows: batchrun show DIR --status refused"),
    ):
        share, earlier = _status(now, status), [_status(night, status) for night in before]
        known = [each for each in earlier if each is not None]
        usual = sum(known) / len(known) if known else 0.0
        if share is not None and share - usual > limit:
            than = f", {usual:.1%} in {_before(known)}" if known else ""
            yield f"{share:.1%} of the answers are {status}{than}", advice


def _invalid(now: Night, before: Sequence[Night], limit: float) -> _Found:
    if (share := _status(now, "invalid")) is not None and share > limit:
        yield (
            f"{share:.1%} of the answers are invalid",
            "batchrun show DIR --status invalid shows why; retry.invalid lets the model correct them",
        )


def _length(now: Night, before: Sequence[Night], limit: float) -> _Found:
    lengths = [percentile(night.profile.lengths, 0.5) for night in (now, *before) if night.profile is not None]
    here, *known = [length for length in lengths if length is not None] or [0.0]
    if now.profile is None or not known:
        return
    usual = sum(known) / len(known)
    if usual and abs(here / usual - 1) > limit:
        yield (
            f"answers are {here:,.0f} characters long (median), {usual:,.0f} in {_before(known)}",
            "compare two nights: batchrun compare OLD NEW",
        )


def _identical(now: Night, before: Sequence[Night], limit: float) -> _Found:
    profile = now.profile
    if profile is None or profile.rows < FEW_ROWS:
        return
    same = sum(count for count in profile.repeated.values() if count > 1)
    if same / profile.rows > limit:
        value, count = profile.repeated.most_common(1)[0]
        yield (
            f"{same:,} of {profile.rows:,} rows have the answer of another question: "
            f"{plural(count, 'time')} {value[:60]!r}",
            "a cache may answer instead of the model, or the prompt may lack the row's own text",
        )


def _cost(now: Night, before: Sequence[Night], limit: float) -> _Found:
    name = "cost per 1,000 rows, $"
    here = figures(now.account, None).get(name)
    known = [each.value for night in before if (each := figures(night.account, None).get(name)) is not None]
    if here is None or not known or not (usual := sum(known) / len(known)):
        return
    if here.value / usual - 1 > limit:
        yield (
            f"1,000 rows cost ${here.value:,.4f}, ${usual:,.4f} in {_before(known)} ({here.value / usual - 1:+.0%})",
            "compare the tokens of both: batchrun report PATH --by night --columns all",
        )


def _cache(now: Night, before: Sequence[Night], limit: float) -> _Found:
    profile = now.profile
    if profile is None or profile.rows < FEW_ROWS or not profile.prompt_tokens or profile.cached_tokens is None:
        return
    shortest = min(profile.prompts.numbers, default=0)
    share = profile.cached_tokens / profile.prompt_tokens
    if shortest >= CACHED_FROM and share < limit:
        yield (
            f"{share:.1%} of the prompts' tokens came from a cache; the shortest prompt has {shortest:,.0f}",
            "put the text that all rows share first, the row's own text last: only a common prefix is cached",
        )


def _retries(now: Night, before: Sequence[Night], limit: float) -> _Found:
    rows, attempts = now.account.done, now.account.attempts
    if rows >= FEW_ROWS and attempts / rows - 1 > limit:
        yield (
            f"{plural(attempts, 'attempt')} for {plural(rows, 'row')}: {attempts / rows - 1:.1%} retries",
            "run.log has the reasons; a lower limits.requests_per_minute avoids 429 responses",
        )


def _model(now: Night, before: Sequence[Night], limit: float) -> _Found:
    if now.profile is None:
        return
    for (requested, answered), count in now.profile.models.most_common():
        one, other = (name.rpartition("/")[2].removeprefix("vtrix-") for name in (requested, answered))
        if not one.startswith(other) and not other.startswith(one) and count / now.profile.rows > limit:
            yield (
                f"{plural(count, 'answer')} to {requested} {'names' if count == 1 else 'name'} the model {answered}",
                "ask the provider which model it serves under that name: its price may differ",
            )


def _unfinished(now: Night, before: Sequence[Night], limit: float) -> _Found:
    if not now.account.complete:
        left, reason = now.account.pending, f": {now.account.reason}" if now.account.reason else ""
        yield (
            f"the run is not complete, {plural(left, 'row')} {are(left)} left{reason}",
            "batchrun status DIR shows its state; run the same command again to resume",
        )


def _unpriced(now: Night, before: Sequence[Night], limit: float) -> _Found:
    models = sorted({line.model for line in now.account.totals if line.unpriced})
    for model in models:
        count = sum(line.unpriced for line in now.account.totals if line.model == model)
        yield (
            f"no known price for {plural(count, 'attempt')} of {model}: not included in any sum",
            f'set one in the job: [pricing."{model}"], or try one: batchrun report PATH --reprice FILE',
        )


def _status(night: Night, status: str) -> float | None:
    rows = night.account.done
    if rows < FEW_ROWS:
        return None
    return sum(line.rows for line in night.account.totals if line.status == status) / rows


_FINDERS: dict[str, Callable[[Night, Sequence[Night], float], _Found]] = {
    "one_value": _one_value,
    "cut": _cut,
    "invalid": _invalid,
    "length": _length,
    "identical": _identical,
    "cost": _cost,
    "cache": _cache,
    "retries": _retries,
    "model": _model,
    "unfinished": _unfinished,
    "unpriced": _unpriced,
}
