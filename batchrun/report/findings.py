"""What a careful colleague would notice in a job's newest run, with figures, a threshold and advice. PURE."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from batchrun.errors import JobError
from batchrun.report.drift import figures
from batchrun.report.latencies import percentile
from batchrun.report.profile import Profile
from batchrun.report.runs import Account

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
"""By finding, the share beyond which it is said; docs/cost.md says of what."""

CACHED_FROM = 1_024
"""Tokens from which providers keep a prefix (their pages on prompt caching, 2026-11)."""

FEW_ROWS = 20
"""Below so many rows a share says little: nothing is said of it."""


class Finding(msgspec.Struct, frozen=True):
    """What was noticed. `name` is by which it is muted."""

    name: str
    job: str
    run_id: str
    said: str
    advice: str


class Night(msgspec.Struct, frozen=True):
    """One run with its rows' profile; None where its rows can't be read."""

    account: Account
    profile: Profile | None


def thresholds(settings: Sequence[str]) -> dict[str, float]:
    """The thresholds with `retries=0.1` laid over them; `retries=off` mutes one, `off` all.

    Raises:
        JobError: an unknown finding, or no number.
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
            raise JobError(f"--finding {setting}: {value!r} is no number") from error
        if not 0 <= found[name] <= 1_000:
            raise JobError(f"--finding {setting}: expected a share of 0 or more")
    return found


def findings(now: Night, before: Sequence[Night], limits: Mapping[str, float]) -> list[Finding]:
    """What is to be noticed in `now`, of which `before` are the job's nights before, the newest first."""
    found = []
    for name, look in _LOOKS.items():
        if name in limits:
            account = now.account
            found += [
                Finding(name, account.job, account.run_id, said, advice)
                for said, advice in look(now, before, limits[name])
            ]
    return found


_Said = Iterator[tuple[str, str]]


def _one_value(now: Night, before: Sequence[Night], limit: float) -> _Said:
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
                "look at a few of those rows: a prompt that asks nothing, or an input that is always the same",
            )


def _cut(now: Night, before: Sequence[Night], limit: float) -> _Said:
    for status, advice in (
        ("truncated", "raise request.max_tokens, and retry them: --retry-failed --status truncated"),
        ("filtered", "look at the rows: batchrun show DIR --status filtered"),
        ("refused", "look at the rows: batchrun show DIR --status refused"),
    ):
        share, earlier = _status(now, status), [_status(night, status) for night in before]
        known = [each for each in earlier if each is not None]
        usual = sum(known) / len(known) if known else 0.0
        if share is not None and share - usual > limit:
            than = f", {usual:.1%} in the {len(known)} nights before" if known else ""
            yield f"{share:.1%} of the answers are {status}{than}", advice


def _invalid(now: Night, before: Sequence[Night], limit: float) -> _Said:
    share = _status(now, "invalid")
    if share is not None and share > limit:
        yield (
            f"{share:.1%} of the answers are invalid",
            "batchrun show DIR --status invalid says what they lack; retry.invalid asks once more",
        )


def _length(now: Night, before: Sequence[Night], limit: float) -> _Said:
    lengths = [percentile(night.profile.lengths, 0.5) for night in (now, *before) if night.profile is not None]
    here, *known = [length for length in lengths if length is not None] or [0.0]
    if now.profile is None or not known:
        return
    usual = sum(known) / len(known)
    if usual and abs(here / usual - 1) > limit:
        yield (
            f"answers are {here:,.0f} characters long (median), {usual:,.0f} in the {len(known)} nights before",
            "compare two nights: batchrun compare OLD NEW",
        )


def _identical(now: Night, before: Sequence[Night], limit: float) -> _Said:
    profile = now.profile
    if profile is None or profile.rows < FEW_ROWS:
        return
    same = sum(count for count in profile.repeated.values() if count > 1)
    if same / profile.rows > limit:
        value, count = profile.repeated.most_common(1)[0]
        yield (
            f"{same:,} of {profile.rows:,} rows have the answer of another question: {count:,} times {value[:60]!r}",
            "a cache that answers for the model, or a prompt without the row's own text",
        )


def _cost(now: Night, before: Sequence[Night], limit: float) -> _Said:
    name = "cost per 1,000 rows, $"
    here = figures(now.account, None).get(name)
    known = [each.value for night in before if (each := figures(night.account, None).get(name)) is not None]
    if here is None or not known or not (usual := sum(known) / len(known)):
        return
    if here.value / usual - 1 > limit:
        yield (
            f"1,000 rows cost ${here.value:,.4f}, ${usual:,.4f} in the {len(known)} nights before "
            f"({here.value / usual - 1:+.0%})",
            "look at tokens in and out of both: batchrun report PATH --by night --columns all",
        )


def _cache(now: Night, before: Sequence[Night], limit: float) -> _Said:
    profile = now.profile
    if profile is None or profile.rows < FEW_ROWS or not profile.prompt_tokens:
        return
    shortest = min(profile.prompts.numbers, default=0)
    share = profile.cached_tokens / profile.prompt_tokens
    if shortest >= CACHED_FROM and share < limit:
        yield (
            f"{share:.1%} of the prompts' tokens came from a cache; the shortest prompt has {shortest:,.0f}",
            "put what all rows share first, the row's own text last: a prefix is cached up to the first difference",
        )


def _retries(now: Night, before: Sequence[Night], limit: float) -> _Said:
    rows, attempts = now.account.done, now.account.attempts
    if rows >= FEW_ROWS and attempts / rows - 1 > limit:
        yield (
            f"{attempts:,} attempts for {rows:,} rows: {attempts / rows - 1:.1%} retries",
            "run.log says for what; a lower limits.requests_per_minute spares refusals",
        )


def _model(now: Night, before: Sequence[Night], limit: float) -> _Said:
    if now.profile is None:
        return
    for (asked, answered), count in now.profile.models.most_common():
        one, other = (name.rpartition("/")[2].removeprefix("vtrix-") for name in (asked, answered))
        if not one.startswith(other) and not other.startswith(one) and count / now.profile.rows > limit:
            yield (
                f"{count:,} answers to {asked} name the model {answered}",
                "ask the provider what it serves under that name: its price may be another",
            )


def _unfinished(now: Night, before: Sequence[Night], limit: float) -> _Said:
    if not now.account.complete:
        reason = f": {now.account.reason}" if now.account.reason else ""
        yield (
            f"the run is not complete, {now.account.pending:,} rows are left{reason}",
            "batchrun status DIR says where it stands, and the same command resumes it",
        )


def _unpriced(now: Night, before: Sequence[Night], limit: float) -> _Said:
    models = sorted({line.model for line in now.account.totals if line.unpriced})
    for model in models:
        count = sum(line.unpriced for line in now.account.totals if line.model == model)
        yield (
            f"no known price for {count:,} attempts of {model}: no sum holds them",
            f'state it in the job: [pricing."{model}"], or see what it would cost: batchrun report PATH --reprice FILE',
        )


def _status(night: Night, status: str) -> float | None:
    rows = night.account.done
    if rows < FEW_ROWS:
        return None
    return sum(line.rows for line in night.account.totals if line.status == status) / rows


_LOOKS: dict[str, Callable[[Night, Sequence[Night], float], _Said]] = {
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
