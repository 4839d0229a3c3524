"""Settings and faults say what is wrong with them in one line; the documentation names every one."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchrun.errors import JobError
from batchrun.simulator import Fault, SimulatorConfig, config_from_json, parse_faults
from batchrun.simulator.faults import Kind
from batchrun.simulator.limits import PlannedChange

DOCUMENT = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()


@pytest.mark.parametrize("setting", SimulatorConfig.__struct_fields__)
def test_every_simulator_setting_is_documented(setting: str) -> None:
    assert f"| `{setting}` |" in DOCUMENT


@pytest.mark.parametrize("field", Fault.__struct_fields__)
def test_every_field_of_a_fault_is_documented(field: str) -> None:
    assert f"`{field}`" in DOCUMENT


@pytest.mark.parametrize("field", PlannedChange.__struct_fields__)
def test_every_field_of_limit_changes_is_documented(field: str) -> None:
    assert f'"{field}"' in DOCUMENT or f"`{field}`" in DOCUMENT


@pytest.mark.parametrize("kind", Kind.__args__)  # type: ignore[attr-defined]  # of a Literal
def test_every_kind_of_fault_is_documented(kind: str) -> None:
    assert f"| `{kind}` |" in DOCUMENT


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"port": 65_536}, "port = 65536"),
        ({"requests_per_minute": 0}, "requests_per_minute = 0"),
        ({"tokens_per_minute": -5}, "tokens_per_minute = -5"),
        ({"latency_s": 5_000}, "latency_s = 5000"),
        ({"latency_sigma": -0.1}, "latency_sigma = -0.1"),
        ({"tokens_per_second": -1}, "tokens_per_second = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"parent_pid": 0}, "parent_pid = 0"),
        ({"host": "0.0.0.0"}, "not a loopback address"),
        ({"host": "example.com"}, "not a loopback address"),
        ({"api_key": ""}, "api_key is empty"),
        ({"latency": 1}, "unknown field `latency`"),
        ({"port": True}, "Expected `int`, got `bool` - at `$.port`"),
        ({"faults": [{"kind": "earthquake"}]}, "earthquake"),
        ({"faults": [{"kind": "status", "share": 2}]}, "share = 2"),
        ({"faults": [{"kind": "status", "status": 99}]}, "status = 99"),
        ({"faults": [{"kind": "status", "from_request": 0}]}, "from_request counts from 1"),
        ({"limit_changes": [{"at_s": -1, "requests_per_minute": 5}]}, "at_s = -1"),
        ({"limit_changes": [{"at_s": 1}]}, "the one at 1 s changes nothing"),
        ({"limit_changes": [{"at_s": 1, "tokens_per_minute": 5}]}, "tokens_per_minute can't change"),
        (
            {"requests_per_minute": 5, "limit_changes": [{"at_s": 1, "requests_per_minute": 0}]},
            "limit_changes: requests_per_minute = 0",
        ),
        (
            {
                "requests_per_minute": 5,
                "limit_changes": [{"at_s": at_s, "requests_per_minute": 5} for at_s in (2, 1)],
            },
            "not in the order",
        ),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(JobError) as caught:
        config_from_json(msgspec.json.encode(settings))
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_survive_the_command_line() -> None:
    config = SimulatorConfig(
        faults=parse_faults("500=0.5,cut=0.1"), models=("vtrix-a",), requests_per_minute=60, ledger="l.jsonl"
    )
    assert config_from_json(msgspec.json.encode(config)) == config


def test_the_short_form_names_statuses_and_faults() -> None:
    refusal, policy, busy, cut = parse_faults("500=0.1, content_policy=0.2,overloaded=1,cut=0.01,")
    assert (refusal.kind, refusal.status, refusal.share, refusal.sticky) == ("status", 500, 0.1, False)
    assert (policy.status, policy.message, policy.share, policy.sticky) == (503, "Content Policy Violation", 0.2, True)
    assert (busy.status, busy.sticky) == (503, False)
    assert "overloaded" in busy.message
    assert (cut.kind, cut.share, cut.is_billed) == ("cut", 0.01, True)
    assert parse_faults("") == ()


def test_a_verdict_on_the_request_sticks_to_it() -> None:
    assert [fault.sticky for fault in parse_faults("400=1,413=1,422=1,408=1,429=1,500=1")] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("text", ["500", "500=x", "earthquake=0.1", "99=0.1", "500=1.5", "cut=nan", "body=0.1"])
def test_a_wrong_short_form_is_refused(text: str) -> None:
    with pytest.raises(JobError, match="faults: "):
        parse_faults(text)
