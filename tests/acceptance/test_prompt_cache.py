"""The prompt cache: `check` says what it saves, `cache_prefix` uses it, the report shows it."""

import json
from pathlib import Path

import pytest

from batchrun.simulator import Fault, LedgerLine, SimulatorConfig
from tests.cli_process import KEY_ENV, batchrun, read_summary
from tests.simulator_process import running_simulator

RULES = " ".join(f"Rule {number}: a review that speaks of part {number} has label {number}." for number in range(120))


def _job(
    tmp_path: Path, *, system: str | None, prompt: str, url: str = "http://127.0.0.1:9/v1", more: str = ""
) -> Path:
    rows = [{"text": f"Review {row} is fine."} for row in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        *(
            "[endpoint]",
            f'url = "{url}"',
            'name = "test"',
            f'api_key_env = "{KEY_ENV}"',
            "[input]",
            f'path = "{tmp_path}/in.jsonl"',
        ),
        *("[request]", 'model = "vtrix-gpt-5.3-codex"', "max_tokens = 16", f"prompt = {json.dumps(prompt)}"),
        *(() if system is None else (f"system = {json.dumps(system)}",)),
    ]
    job = tmp_path / "job.toml"
    job.write_text("\n".join(lines) + "\n")
    return job


def test_check_measures_the_shared_beginning(tmp_path: Path) -> None:
    ended = batchrun("check", _job(tmp_path, system=RULES, prompt="{{ text }}"))
    assert ended.exit_code == 0
    assert "prompt cache 200 of 200 rows begin alike in 1 group: 6," in ended.stdout
    assert "about 1,664 tokens each" in ended.stdout
    assert "cached, they cost $0.5215 less" in ended.stdout  # 199 × 1,664 × (1.75 − 0.175) / 1,000,000
    assert "request.cache_prefix = true" in ended.stdout
    assert "warning" not in ended.stderr


@pytest.mark.parametrize(
    ("system", "prompt"), [(None, "{{ text }} " + RULES), ("Label this: {{ text }}", RULES)], ids=["prompt", "system"]
)
def test_check_warns_of_row_data_before_shared_text(tmp_path: Path, system: str | None, prompt: str) -> None:
    ended = batchrun("check", _job(tmp_path, system=system, prompt=prompt))
    assert ended.exit_code == 0
    assert "warning: row data comes before about 1," in ended.stderr
    assert "put row data last, and all rows cost up to $0." in ended.stderr
    assert "begin alike" not in ended.stdout


def test_check_is_silent_about_short_prompts(tmp_path: Path) -> None:
    ended = batchrun("check", _job(tmp_path, system="Label it.", prompt="{{ text }}"))
    assert "cache" not in ended.stdout + ended.stderr


def _run(tmp_path: Path, job: Path, *settings: str) -> str:
    sets = [word for setting in settings for word in ("--set", setting)]
    ended = batchrun("run", job, "-o", tmp_path / "out", *sets)
    assert ended.exit_code == 0, ended.stderr
    return ended.stdout


def _cached_share(ledger: list[LedgerLine]) -> float:
    return sum(line.cached_tokens for line in ledger) / sum(line.prompt_tokens for line in ledger)


def test_one_row_of_each_group_goes_first(tmp_path: Path) -> None:
    job = _job(tmp_path, system="Customer {{ text[7] }}. " + RULES, prompt="{{ text }}")
    with running_simulator(SimulatorConfig(latency_s=0.3, latency_sigma=0, cache_life_s=60)) as simulator:
        job.write_text(job.read_text().replace("http://127.0.0.1:9/v1", simulator.url))
        _run(tmp_path, job, "request.cache_prefix=true")
        ledger = simulator.ledger()
    assert len(ledger) == 200
    groups: dict[str, list[LedgerLine]] = {}
    for line in ledger:
        row = int(str(line.client_request_id).split("-")[-2])
        groups.setdefault(str(row)[0], []).append(line)
    assert len(groups) == 9 + 1
    for lines in groups.values():
        first, *others = sorted(lines, key=lambda line: line.arrived_s)
        assert first.cached_tokens == 0
        assert all(line.arrived_s > first.time_s for line in others)


@pytest.mark.heavy
def test_cache_prefix_raises_the_cached_share(tmp_path: Path) -> None:
    shares = []
    for cache_prefix in ("false", "true"):
        place = tmp_path / cache_prefix
        place.mkdir()
        job = _job(place, system=RULES, prompt="{{ text }}")
        with running_simulator(SimulatorConfig(latency_s=0.2, cache_life_s=60)) as simulator:
            job.write_text(job.read_text().replace("http://127.0.0.1:9/v1", simulator.url))
            reported = _run(place, job, f"request.cache_prefix={cache_prefix}")
            ledger = simulator.ledger()
        assert len(ledger) == 200
        assert f" cached, {_cached_share(ledger):.0%})" in reported
        totals = read_summary(place / "out")["totals"]
        assert sum(line["cached_tokens"] for line in totals) == sum(line.cached_tokens for line in ledger)
        shares.append(_cached_share(ledger))
    plain, ordered = shares
    assert ordered > 0.8
    assert ordered > plain + 0.2


def test_a_group_outlives_its_failed_first_row(tmp_path: Path) -> None:
    job = _job(tmp_path, system=RULES, prompt="{{ text }}")
    faults = (Fault(kind="status", status=400, match="Review 0 "), Fault(kind="status", status=500, share=0.2))
    with running_simulator(SimulatorConfig(latency_s=0.01, faults=faults)) as simulator:
        job.write_text(job.read_text().replace("http://127.0.0.1:9/v1", simulator.url))
        sets = ("--set", "request.cache_prefix=true", "--set", "retry.backoff_base_s=0.05")
        ended = batchrun("run", job, "-o", tmp_path / "out", *sets)
    assert ended.exit_code == 3, ended.stderr
    assert read_summary(tmp_path / "out")["by_status"]["error"] == 1
    assert read_summary(tmp_path / "out")["pending"] == 0
