"""The lines that a start prints at its end: rows by status, tokens, cost, rate, files, and what to do next. PURE."""

from collections.abc import Collection, Iterator, Sequence
from decimal import Decimal

from batchrun.errors import quoted
from batchrun.job.settings import Endpoint
from batchrun.records import FAILURES, Status
from batchrun.report.cost_lines import cost_lines, estimate_in_words
from batchrun.report.notices import nearly_used, unknown_reason
from batchrun.report.suggested_fixes import Fix, command_with, fix_for, fix_for_address, fix_for_key
from batchrun.report.summary import RATE_S, failures
from batchrun.report.wording import are, plural, rounded
from batchrun.run_summary import Summary, cached_share, stated

LABEL_WIDTH = 13  # "completions", the longest label, and two spaces


def in_words(
    summary: Summary,
    *,
    requests_per_minute: float | None,
    max_failures: int,
    failing: Collection[Status] = FAILURES,
    command: Sequence[str] = (),
    settings: Collection[str] | None = None,
    endpoint: Endpoint | None = None,
) -> Iterator[str]:
    """The closing lines.

    `command` is the command line that ran, from which the next one is made. `settings` are the paths that the job sets
    in `[request]`: no setting changes what the rows bring themselves. `endpoint` says where the API key comes from.
    """
    line, again = [quoted(word) for word in command], "run the same command again to resume"
    if "--new" in command and summary.command is not None:  # typed again, it would start another run
        line, again = [summary.command], f"resume with {summary.command}"
    for label, text in (
        *_account(summary, requests_per_minute),
        *_failed(summary, max_failures, failing, line, settings),
        *_stopped(summary, line, again, settings, endpoint),
    ):
        yield f"{label:<{LABEL_WIDTH}}{text}"


def _account(summary: Summary, requests_per_minute: float | None) -> Iterator[tuple[str, str]]:
    done = summary.done
    counts = ", ".join(f"{n:,} {status}" for status, n in summary.by_status.items()) or "none"
    aside = f"; {plural(summary.rejected, 'input record')} set aside in rejects.jsonl" if summary.rejected else ""
    yield "rows", f"{done:,} of {summary.rows:,} done: {counts}{aside}"
    if summary.reused:
        copies = f", {summary.duplicates:,} of them equal to an earlier row" if summary.duplicates else ""
        saved = f"; ${summary.saved_usd:,.6f} saved" if summary.saved_usd else ""
        yield "reused", f"{plural(summary.reused, 'row')} without a request{copies}{saved}"
    prompt = sum(line.prompt_tokens for line in summary.totals)
    completion = sum(line.completion_tokens for line in summary.totals)
    cached, reasoning = stated(summary.totals, "cached_tokens"), stated(summary.totals, "reasoning_tokens")
    share = cached_share(summary.totals)
    cached_part = f" ({cached:,} cached, {share:.0%})" if share is not None else ""
    reasoning_part = f" ({reasoning:,} reasoning)" if reasoning else ""
    yield "tokens", f"{prompt:,} in{cached_part}, {completion:,} out{reasoning_part}"
    cost, *beyond = cost_lines(summary)
    yield "cost", cost
    for tier in sorted({line.service_tier for line in summary.totals} - {""}):
        lines = [line for line in summary.totals if line.service_tier == tier]
        rows, cost_usd = sum(line.rows for line in lines), sum((line.cost_usd for line in lines), Decimal(0))
        yield "", f"service tier {tier}: {plural(rows, 'row')}, ${cost_usd:,.6f}"
    for text in (*beyond, *(summary.price or "").split("; ")):
        if text:
            yield "", text
    if (estimate := estimate_in_words(summary)) is not None:
        yield "estimate", estimate
    yield "rate", _rate(summary, requests_per_minute)
    for each in summary.endpoints:
        aside = "" if each.set_aside is None else f"; set aside: {each.set_aside}"
        yield "endpoint", f"{each.label}: {plural(each.requests, 'request')}, {each.answered:,} answered{aside}"
    for name, rows in summary.models.items():
        if all(line.model != name for line in summary.totals):
            yield "note", f"{plural(rows, 'answer')} {'names' if rows == 1 else 'name'} the model {name}"
    for reason in summary.unknown_finish_reasons:
        yield "note", unknown_reason(reason)
    for use in summary.budgets:
        if use.is_nearly_used:
            yield "budget", nearly_used(use)
    yield from summary.files.items()


def _rate(summary: Summary, requests_per_minute: float | None) -> str:
    """The requests that this start sent, compared with the limit."""
    allowed = f"{rounded(float(requests_per_minute)):,}" if requests_per_minute else ""
    if summary.elapsed_s < RATE_S:
        sent = plural(round(summary.requests_per_minute * summary.elapsed_s / 60), "request")
        tokens = plural(round(summary.tokens_per_minute * summary.elapsed_s / 60), "token")
        limit = f" ({allowed} requests/min allowed)" if allowed else ""
        return f"{sent}, {tokens} in {summary.elapsed_s:,.1f} s{limit}"
    limit = f" of {allowed} allowed" if allowed else ""
    if requests_per_minute and summary.requests_per_minute > requests_per_minute:
        changed = summary.tuned is not None and summary.tuned.refused is None
        limit = f" ({allowed} allowed" + (", changed during the run)" if changed else " after the first burst)")
    requests = f"{summary.requests_per_minute:,.0f} requests/min{limit}"
    return f"{requests}, {summary.tokens_per_minute:,.0f} tokens/min, {summary.elapsed_s:,.1f} s"


def pace(summary: Summary) -> str:
    """How fast this start completes rows, as a rate if it has run for a minute."""
    if summary.elapsed_s >= RATE_S:
        return f"{summary.rows_per_minute:,.0f} rows/min"
    rows = sum(line.rows for line in summary.totals if line.invocation == summary.invocation)
    return f"{plural(rows, 'row')} in {summary.elapsed_s:,.0f} s"


def _failed(
    summary: Summary,
    max_failures: int,
    failing: Collection[Status],
    line: Sequence[str],
    settings: Collection[str] | None,
) -> Iterator[tuple[str, str]]:
    """The failed rows of a complete run, one of their errors, and how to retry them."""
    failed = failures(summary, failing)
    if not summary.complete or not failed:
        return
    allowed = f"{'more than' if failed > max_failures else 'within'} output.max_failures = {max_failures:,}"
    them = "it" if failed == 1 else "them"
    yield "failed", f"{plural(failed, 'row')}, {allowed}: see the column `error`; --retry-failed retries {them}"
    if summary.example_error is not None and summary.by_status.get(Status.ERROR):
        yield "", f"for example: {summary.example_error}"
        if (fix := fix_for(summary.example_error, settings)) is not None:
            yield from _fixed(fix, line, "", retry=True)


def _stopped(
    summary: Summary, line: Sequence[str], again: str, settings: Collection[str] | None, endpoint: Endpoint | None
) -> Iterator[tuple[str, str]]:
    """Why the run is not complete, and how to resume it."""
    if summary.complete:
        return
    reason = summary.reason or "before the end"
    yield "stopped", reason
    fix = None if endpoint is None else fix_for_key(reason, endpoint) or fix_for_address(reason)
    if fix is None and summary.example_error is not None and summary.example_error in reason:
        fix = fix_for(summary.example_error, settings)
    if fix is not None:
        yield from _fixed(fix, line, again, retry=False)
    else:
        if summary.pending:
            left = f"{plural(summary.pending, 'row')} {are(summary.pending)} left"
        else:
            left = "no row is left, but there is no result yet"
        yield "next", f"{left}; {again}"
    if summary.export is not None:
        yield "rows so far", summary.export


def _fixed(fix: Fix, line: Sequence[str], again: str, *, retry: bool) -> Iterator[tuple[str, str]]:
    """The setting that fixes what the server rejects, and the command that tries it."""
    yield "fix", f"{fix.setting}: {fix.what}"
    if fix.value is not None:
        yield "next", command_with(line or ["the same with"], fix, retry=retry)
    elif fix.same_command:
        yield "next", f"then {again}"
    else:
        flag = "--retry-failed" if retry else "--accept-changes"
        yield "next", f"change it, then run the same command with {flag}"
