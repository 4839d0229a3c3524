"""What is unusual in a night, each in a made night that has just that; what jumped; what changed row by row."""

import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from batchrun.errors import InputError, JobError
from batchrun.report import compare, earlier_runs, findings, run_rows
from batchrun.report.bill import Bill, Query, bill_of
from batchrun.report.runs import find_runs
from tests.cli_process import batchrun
from tests.result_files import row, write_result

ROWS = 200
Change = Callable[[int], dict[str, Any]]


def night(folder: Path, number: int, change: Change, *, typed: bool = False, **summary: Any) -> Path:
    started = f"2026-11-{number:02d}T01:00:00Z"
    rows = [row(place, **change(place)) for place in range(ROWS)]
    return write_result(folder / f"2026-11-{number:02d}", rows, typed=typed, created_at=started, **summary)


def collect(folder: list[Path], query: Query) -> Bill:
    return bill_of(find_runs(folder), query)


def plain(_: int) -> dict[str, Any]:
    return {}


DEARER = {"cost_usd": Decimal("0.0014"), "answer_cost_usd": Decimal("0.0014")}
UNPRICED = {"cost_usd": None, "answer_cost_usd": None}
SAME = "The same long answer, whatever was the question."


def status(status: str) -> Change:
    return lambda n: {"status": "ok" if n % 10 else status}


FOUND: dict[str, tuple[Change, dict[str, Any], str]] = {
    "one_value": (lambda n: {"content": "yes" if n % 4 else f"no {n}"}, {}, "content is 'yes' in 75% of 200 answers"),
    "cut": (status("truncated"), {}, "10.0% of the answers are truncated, 0.0% in"),
    "invalid": (status("invalid"), {}, "10.0% of the answers are invalid"),
    "length": (lambda n: {"content": f"a much longer answer, number {n:06d}"}, {}, "characters long (median), 9"),
    "identical": (
        lambda n: {"content": f"answer {n}" if n % 5 else SAME},
        {},
        "40 of 200 rows have the answer",
    ),
    "cost": (lambda n: DEARER, {}, "1,000 rows cost $1.4000, $1.0000"),
    "cache": (
        lambda n: {"prompt_tokens": 2000, "cached_tokens": 50},
        {},
        "2.5% of the prompts' tokens came",
    ),
    "retries": (lambda n: {"attempts": 1 if n % 10 else 2}, {}, "220 attempts for 200 rows: 10.0% retries"),
    "model": (
        lambda n: {"model": "other-model" if n < 7 else "gpt-5.3-codex-2026-02"},
        {},
        "7 answers to vtrix-gpt-5.3-codex name the model other-model",
    ),
    "unfinished": (plain, {"complete": False, "pending": 9, "reason": "budget"}, "complete, 9 rows are left: budget"),
    "unpriced": (lambda n: UNPRICED, {}, "no known price for 200 attempts of vtrix-gpt-5.3"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", FOUND)
def test_each_finding_is_reported_and_can_be_muted(tmp_path: Path, name: str) -> None:
    change, summary, said = FOUND[name]
    for number in (1, 2):
        night(tmp_path, number, plain)
    night(tmp_path, 3, change, **summary)
    found = collect([tmp_path], Query(("job",), limits=findings.THRESHOLDS)).findings
    (mine,) = [each for each in found if each.name == name]
    assert said in mine.text
    assert (mine.run_id, bool(mine.advice)) == ("2026-11-03", True)
    assert {each.name for each in found} <= {name, "identical", "one_value", "length"}
    limits = findings.thresholds([f"{name}=off"])
    assert name not in {each.name for each in collect([tmp_path], Query(("job",), limits=limits)).findings}


def test_usual_runs_have_no_findings(tmp_path: Path) -> None:
    assert list(FOUND) == list(findings.THRESHOLDS)
    for number in (1, 2, 3):
        night(tmp_path, number, plain)
    assert collect([tmp_path], Query(("job",), limits=findings.THRESHOLDS)).findings == ()


@pytest.mark.parametrize("stated", [None, 0])
def test_an_unreported_cache_is_not_an_unused_one(tmp_path: Path, stated: int | None) -> None:
    """Null where no answer stated its cached tokens, 0 where all of them stated 0, in each format of the bill."""
    night(tmp_path, 1, lambda n: {"prompt_tokens": 2000, "cached_tokens": stated})
    found = "finding (cache)" in batchrun("report", tmp_path, "--findings").stdout
    assert found == (stated == 0)
    bill = json.loads(batchrun("report", tmp_path, "--format", "json").stdout)["total"]
    assert (bill["prompt_tokens"], bill["cached_tokens"], bill["cached_share"]) == (400_000, stated, stated)
    columns = "--columns", "cached_tokens,cached_share"
    as_csv = batchrun("report", tmp_path, "--format", "csv", *columns).stdout.splitlines()[1]
    assert as_csv.endswith(",," if stated is None else ",0,0.0")
    as_text = batchrun("report", tmp_path, *columns).stdout.splitlines()[-1].split()
    assert as_text[-2:] == (["–", "–"] if stated is None else ["0.0", "%"])


def test_thresholds_can_be_set_within_range(tmp_path: Path) -> None:
    night(tmp_path, 1, lambda n: {"attempts": 2 if n % 10 == 0 else 1})
    assert "finding (retries): job: 220 attempts" in batchrun("report", tmp_path, "--findings").stdout
    assert "finding" not in batchrun("report", tmp_path).stdout
    for quiet in ("retries=0.2", "retries=off", "off"):
        assert "finding" not in batchrun("report", tmp_path, "--finding", quiet).stdout
    reported = json.loads(batchrun("report", tmp_path, "--findings", "--format", "json").stdout)
    assert [each["name"] for each in reported["findings"]] == ["retries"]
    for wrong in ("nothing=1", "retries=much", "retries", "retries=-1", "retries=nan"):
        with pytest.raises(JobError, match=r"^--finding"):
            findings.thresholds([wrong])


# ── night over night ──────────────────────────────────────────────────────────────────────────────────────────────────


def labels(shares: Sequence[int], scores: float = 0.0) -> Change:
    """Answers by the shares of their labels, in percent."""
    names = [name for name, share in zip(("good", "bad", "mixed"), shares, strict=True) for _ in range(share)]

    def change(number: int) -> dict[str, Any]:
        note = None if number % 3 else "x"
        return {"parsed": {"label": names[number % 100], "score": number % 7 + scores, "note": note}}

    return change


def test_jumps_beyond_the_spread_can_fail(tmp_path: Path) -> None:
    for number, shares in enumerate(((50, 30, 20), (54, 27, 19), (47, 32, 21)), 1):
        night(tmp_path, number, labels(shares), typed=True)
    night(tmp_path, 4, labels((51, 30, 19)), typed=True)
    usual = batchrun("report", tmp_path, "--against", "3", "--fail-on-drift")
    assert usual.exit_code == 0, usual.stdout
    assert "0 of " in usual.stdout
    night(tmp_path, 5, labels((20, 60, 20), scores=9.0), typed=True)
    ended = batchrun("report", tmp_path, "--against", "4", "--fail-on-drift")
    assert ended.exit_code == 8
    jumped = [line.partition(": ")[2] for line in ended.stdout.splitlines() if line.startswith("jumped: ")]
    assert {line.partition(": ")[0] for line in jumped} == {
        "label = good",
        "label = bad",
        "score p10",
        "score p50",
        "score p90",
    }
    assert any(line.startswith("label = good: 20.0%, before 50.5% (± ") for line in jumped)
    assert batchrun("report", tmp_path, "--against", "4").exit_code == 0
    reported = json.loads(batchrun("report", tmp_path, "--against", "last", "--format", "json").stdout)
    (compared,) = reported["against"]
    assert (compared["job"], len(compared["before"])) == ("job", 1)
    assert "label = good" in compared["jumped"]
    other = json.loads(batchrun("report", tmp_path, "--against", tmp_path / "2026-11-02", "--format", "json").stdout)
    assert other["against"][0]["before"] == [str(tmp_path / "2026-11-02")]


def test_noise_is_no_jump_a_new_value_is(tmp_path: Path) -> None:
    night(tmp_path, 1, lambda n: {"status": "ok" if n % 50 else "filtered"})
    night(tmp_path, 2, lambda n: {"status": "ok" if n % 33 else "filtered"})
    assert not collect([tmp_path], Query(("job",), against=earlier_runs.against("last"))).drifted
    night(tmp_path, 3, lambda n: {"status": "ok" if n % 5 else "empty"})
    (compared,) = collect([tmp_path], Query(("job",), against=earlier_runs.against("2"))).against
    assert "status empty" in compared.jumped


def test_comparing_needs_an_earlier_run(tmp_path: Path) -> None:
    night(tmp_path, 1, plain)
    with pytest.raises(InputError, match="no complete run before"):
        collect([tmp_path], Query(("job",), against=earlier_runs.against("last")))
    for wrong in ("0", "yesterday", str(tmp_path / "nowhere")):
        with pytest.raises(JobError, match=r"^--against"):
            earlier_runs.against(wrong)
    assert batchrun("report", tmp_path, "--fail-on-drift").exit_code == 2


# ── row by row ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_aligned_by_id_in_any_order(tmp_path: Path) -> None:
    """Changes are counted field by field."""
    label = {"label": "good", "score": 1.0, "note": None}
    one = [row(number, parsed=label) for number in range(100)]
    other = [
        row(number, parsed=label | {"label": "bad" if number % 10 == 0 else "good"}, cost_usd=Decimal("0.002"))
        for number in reversed(range(10, 120))
    ]
    other[0] |= {"status": "error", "content": None, "parsed": None, "cost_usd": None}
    other[40] |= {"status": "truncated"}
    before = write_result(tmp_path / "a", one, typed=True)
    after = write_result(tmp_path / "b", other, typed=True, prefix="new_")
    results = [run_rows.result_of(place) for place in (before, after)]
    assert results[0] is not None
    assert results[1] is not None
    found = compare.compare(results[0], results[1], None)
    assert (found.by, found.both, found.only_before, found.only_after, found.repeated) == ("id", 90, 10, 20, 0)
    assert found.changed["parsed.label"] == 9
    assert (found.changed["parsed.score"], found.changed["content"], found.changed["status"]) == (0, 0, 1)
    assert found.statuses == {"ok → ok": 89, "ok → truncated": 1}
    assert (found.before_usd, found.after_usd, found.priced) == (Decimal("0.090"), Decimal("0.180"), 90)
    assert {example.id for example in found.examples} >= {"r10", "r90"}
    shown = batchrun("compare", before, after, "-n", "3").stdout
    assert "parsed.label: 9 changed (10.0%)" in shown
    assert "cost: $0.090000 → $0.180000, +$0.090000 (+100.0%), over 90 rows of known cost" in shown
    reported = json.loads(batchrun("compare", before, after, "--json", "--id", "text").stdout)
    assert (reported["by"], reported["both"]) == ("text", 90)
    assert batchrun("compare", before, after, "--id", "nothing").exit_code == 2


@pytest.mark.sampled(1)
@pytest.mark.parametrize("by", ["id", "text", "row"])
def test_a_comparison_in_pieces_is_the_same(tmp_path: Path, by: str) -> None:
    """Results are compared piece by piece, so that memory does not grow with them."""
    one = [row(number, content="good") for number in range(300)]
    other = [row(number, content="bad" if number % 7 == 0 else "good") for number in reversed(range(50, 400))]
    results = [run_rows.result_of(write_result(tmp_path / name, rows)) for name, rows in (("a", one), ("b", other))]
    assert results[0] is not None
    assert results[1] is not None
    whole = compare.compare(results[0], results[1], by)
    assert len(whole.examples) == 20
    for piece_rows in (7, 100, 399):
        assert compare.compare(results[0], results[1], by, piece_rows=piece_rows) == whole


def test_repeated_ids_are_left_out_and_counted(tmp_path: Path) -> None:
    one = [row(number) for number in range(10)]
    twice = [*one, row(3, row=10), row(11, id=None)]
    results = [run_rows.result_of(write_result(tmp_path / name, rows)) for name, rows in (("a", one), ("b", twice))]
    assert results[0] is not None
    assert results[1] is not None
    found = compare.compare(results[0], results[1], None)
    assert (found.both, found.only_before, found.repeated) == (9, 1, 3)
