"""What a run says of its cost, against servers whose usage is in words of their own."""

import asyncio
from decimal import Decimal
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from batchrun.records import PossiblyBilled
from batchrun.report import run_list
from batchrun.report.closing import in_words
from batchrun.report.cost_lines import cost_lines, estimate_in_words
from batchrun.report.progress import line
from batchrun.report.run_list import ListedRun
from batchrun.run_summary import Estimate, TotalsLine
from tests.cli_process import Ended, finish, read_summary, start, write_job, write_rows
from tests.fault_server import FaultServer, answer, sends, serving
from tests.run.test_progress import summary

REASONING = {"reasoning_tokens": 150}
GROK = {"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 175, "completion_tokens_details": REASONING}


def ran(tmp_path: Path, model: str, fields: dict[str, object], *flags: str, header: str = "") -> tuple[Ended, int]:
    """A run of 100 rows against a server with this answer, and how many it answered."""
    tmp_path.mkdir(exist_ok=True)
    choice = {"message": {"content": "Fine."}, "finish_reason": "stop"}
    body = msgspec.json.encode({"id": "c", "model": model, "choices": [choice], **fields})

    async def main() -> tuple[Ended, FaultServer]:
        async with serving(sends(answer(body, *([header] if header else [])))) as server:
            job = write_job(tmp_path / "job.toml", server.url, write_rows(tmp_path / "in.jsonl", 100))
            process = start("run", job, "-o", tmp_path / "out", "--set", f"request.model={model}", *flags)
            return await asyncio.to_thread(finish, process), server

    ended, server = asyncio.run(main())
    return ended, len(server.exchanges)


def test_a_cap_covers_reasoning_outside_the_completion(tmp_path: Path) -> None:
    flags = ("--max-cost", "0.03", "--set", "request.max_tokens=200")
    ended, answered = ran(tmp_path, "grok-4", {"usage": GROK}, *flags)
    assert ended.exit_code == 4, ended.stderr
    assert 0 < answered * Decimal("0.002565") <= Decimal("0.03")
    assert Decimal(read_summary(tmp_path / "out")["cost_usd"]) == answered * Decimal("0.002565")
    assert "the list price of X AI for grok-4, not the endpoint's own" in ended.stderr + ended.stdout


def test_a_cap_covers_the_dearest_tier(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}
    flags = ("--max-cost", "0.005", "--set", "request.max_tokens=100")
    ended, answered = ran(tmp_path, "gpt-5-mini", {"usage": usage, "service_tier": "priority"}, *flags)
    assert ended.exit_code == 4, ended.stderr
    assert 0 < answered * Decimal("0.000369") <= Decimal("0.005")  # 20 x 0.45 + 100 x 3.60 per million
    assert Decimal(read_summary(tmp_path / "out")["cost_usd"]) == answered * Decimal("0.000369")


def test_an_unpriced_tier_is_not_an_unpriced_model(tmp_path: Path) -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}
    ended, _ = ran(tmp_path, "gpt-5-mini", {"usage": usage, "service_tier": "scale"})
    assert ended.exit_code == 0, ended.stderr
    reported = (
        "answers came from the service tier 'scale', whose price is unknown, while the model's plain price is known"
    )
    assert ended.stderr.count(f"warning: {reported}") == 1
    said = "no known price for 100 attempts (none for the service tier scale): not included in any sum"
    assert said in ended.stderr + ended.stdout
    assert read_summary(tmp_path / "out")["unpriced_tiers"] == ["scale"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("used", "what"),
    [
        ({"prompt_tokens_details": {"audio_tokens": 10}}, "audio"),
        ({"completion_tokens_details": {"audio_tokens": 10, "image_tokens": 5}}, "audio, images"),
        ({"server_tool_use": {"web_search_requests": 1}}, "web searches"),
    ],
)
def test_audio_and_searches_are_not_billed_as_text(tmp_path: Path, used: dict[str, object], what: str) -> None:
    usage = {"prompt_tokens": 20, "completion_tokens": 100, "total_tokens": 120}
    ended, _ = ran(tmp_path, "gpt-5-mini", {"usage": usage | used})
    assert ended.exit_code == 0, ended.stderr
    assert ended.stderr.count(f"warning: answers used {what}, which the price list has no price for") == 1
    assert f"no known price for 100 attempts (none for {what}): not included in any sum" in ended.stderr + ended.stdout
    stated = read_summary(tmp_path / "out")
    assert (stated["unpriced"], stated["unpriced_usage"]) == (100, [what])
    price = "pricing.gpt-5-mini.input=1", "pricing.gpt-5-mini.output=1"
    flags = [flag for each in price for flag in ("--set", each)]
    own, _ = ran(tmp_path / "own", "gpt-5-mini", {"usage": usage | used}, *flags)
    assert own.exit_code == 0, own.stderr
    assert Decimal(read_summary(tmp_path / "own" / "out")["cost_usd"]) == 100 * Decimal("0.00012")


def test_a_stated_cost_is_kept(tmp_path: Path) -> None:
    """It is the cost where no price is known."""
    ended, answered = ran(tmp_path, "my-alias", {"usage": GROK}, header="x-litellm-response-cost: 0.00123")
    assert (ended.exit_code, answered) == (0, 100), ended.stderr
    rows = pq.read_table(tmp_path / "out" / "completions.parquet").to_pylist()
    assert {(row["cost_usd"], row["reported_cost_usd"]) for row in rows} == {(Decimal("0.00123"),) * 2}
    (totals,) = pq.read_table(tmp_path / "out" / "usage.parquet").to_pylist()
    assert (totals["cost_usd"], totals["reported_cost_usd"]) == (Decimal("0.123"), Decimal("0.123"))


def test_an_unknown_cost_reads_unknown_in_every_line(tmp_path: Path) -> None:
    ended, _ = ran(tmp_path, "my-alias", {})
    assert ended.exit_code == 0, ended.stderr
    assert "$0.00" not in ended.stdout + ended.stderr
    assert "cached" not in ended.stdout + ended.stderr


DOUBT = PossiblyBilled(0, 1, "k", None, 100, "timeout", 1)


@pytest.mark.parametrize(
    ("bounds", "usd", "said"),
    [
        ((None,), "0", "it may have been billed, at an unknown price"),
        ((None, Decimal(1)), "1", "those with a known price may have cost up to $1.000000 more"),
        ((Decimal(1),), "1", "it may have cost up to $1.000000 more"),
    ],
)
def test_unpriced_possible_billing_has_no_bound(bounds: tuple[Decimal | None, ...], usd: str, said: str) -> None:
    doubts = [msgspec.structs.replace(DOUBT, upper_bound_usd=bound) for bound in bounds]
    reported = summary(possibly_billed=doubts, possibly_billed_count=len(doubts), possibly_billed_usd=Decimal(usd))
    assert "; ".join(cost_lines(reported)).endswith(f"without a known end; {said}")


@pytest.mark.parametrize(("usd", "compared"), [("0.5", "; the cost is as estimated"), ("0", "")])
def test_an_estimate_needs_a_cost_to_compare(usd: str, compared: str) -> None:
    """A run whose rows all failed is not "100 % below" its estimate."""
    estimate = Estimate(10, 100, 100, None, Decimal("0.5"), None, None, "requests", "upper bounds")
    reported = summary(rows=10, pending=0, estimate=estimate, cost_usd=Decimal(usd))
    assert estimate_in_words(reported) == f"$0.500000 for 10 rows{compared}"


@pytest.mark.parametrize(("cached", "said"), [(None, "900 in, 20 out"), (0, "900 in (0 cached, 0%), 20 out")])
def test_a_cache_that_no_answer_names_is_not_zero(cached: int | None, said: str) -> None:
    line = TotalsLine(1, "m", "ok", "2026-11-27", prompt_tokens=900, completion_tokens=20, cached_tokens=cached)
    closing = in_words(summary(totals=[line], models={}), requests_per_minute=None, max_failures=0)
    assert f"tokens       {said}" in list(closing)


def test_requests_without_known_end_have_unknown_cost() -> None:
    """All attempts timed out at an unknown price, and each may have been billed."""
    unpriced = summary(possibly_billed=[DOUBT], possibly_billed_count=1, cost_usd=Decimal(0))
    assert cost_lines(unpriced)[0] == "unknown"
    assert "cost unknown" in line(unpriced)
    bounded = msgspec.structs.replace(DOUBT, upper_bound_usd=Decimal(1))
    priced = summary(possibly_billed=[bounded], possibly_billed_usd=Decimal(1), cost_usd=Decimal(0))
    assert cost_lines(priced)[0] == "at most $1.000000"
    assert "at most $1.0000" in line(priced)
    assert cost_lines(summary(cost_usd=Decimal(0)))[0] == "$0.000000"


def test_a_list_of_runs_has_bounds() -> None:
    """Where only requests without a known end can have cost anything, the list shows the most they may have cost."""
    listed = msgspec.convert(
        dict.fromkeys(("created_at", "updated_at", "age_s", "exit_code", "reason", "next"))
        | {"path": "runs/a", "job": "a", "state": "paused", "working": False, "complete": False, "by_status": {}}
        | {
            "rows": 2,
            "done": 0,
            "failed": 0,
            "pending": 2,
            "cost_usd": 0,
            "possibly_billed_usd": "0.25",
            "unpriced": 0,
        },
        ListedRun,
    )
    assert "at most $0.2500" in "\n".join(run_list.lines([listed]))


def test_headlines_say_what_is_known() -> None:
    totals = [TotalsLine(1, "m", "ok", "2026-11-28", "", 1, 1, 10, None, 2, None, 12, Decimal(0), 0, 1)]
    reported = summary(totals=totals, cost_usd=Decimal(0), without_usage=1)
    assert "cost unknown" in line(reported)
    closing = "\n".join(in_words(reported, requests_per_minute=None, max_failures=0))
    assert "10 in, 2 out" in closing
    assert "$0.00" not in closing
