"""A refusal that names a parameter names the setting that cures it, and the command that is printed works."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from batchrun.report.suggested_fixes import Fix, command_with, fix_for, fix_for_address
from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import KEY, Ended, batchrun, read_summary, write_job, write_rows
from tests.endings import answer_body
from tests.fault_server import Exchange, Script, answer, serving_aside
from tests.simulator_process import running_simulator

FIELD, ROLE = "endpoint.max_tokens_field", "endpoint.developer_role"

STREAM_OPTIONS = "Unrecognized request argument supplied: stream_options"

CURES: list[tuple[str, str | None, str | None]] = [
    # what the server says, the setting, the value that is tried; None: a person must choose, or there is no cure
    (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
        FIELD,
        "max_completion_tokens",
    ),
    ("Unrecognized request argument supplied: max_completion_tokens", FIELD, "max_tokens"),
    ("body.max_completion_tokens: Extra inputs are not permitted", FIELD, "max_tokens"),
    (
        "Use max_completion_tokens instead of max_tokens, which this model does not support",
        FIELD,
        "max_completion_tokens",
    ),
    (
        "max_tokens is too large: 50000. This model supports at most 16384 completion tokens",
        "request.max_tokens",
        "16384",
    ),
    ("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", "request.max_tokens", "8192"),
    ("Range of max_tokens should be [1, 2,000]", "request.max_tokens", "2000"),
    ("`max_tokens` must be less than or equal to `8192`", "request.max_tokens", "8192"),
    (
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 4096, but got 5000 instead.",
        "request.max_tokens",
        "4096",
    ),
    ("'max_tokens' is too large: 5000. This model's maximum context length is 4096 tokens", "request.max_tokens", None),
    ("max_tokens: Field required", "request.max_tokens", None),
    (
        "max_tokens: 5000 > 4096, which is the maximum allowed number of output tokens for claude-3",
        "request.max_tokens",
        "4096",
    ),
    (
        "This model's maximum context length is 4096 tokens. However, you requested 5010 tokens (10 in the messages, "
        "5000 in the completion). Please reduce the length of the messages or completion.",
        "request.max_tokens",
        "3064",
    ),
    (
        "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is 4096 "
        "tokens and your request has 96 input tokens (5000 > 4096 - 96).",
        "request.max_tokens",
        "3000",
    ),
    (
        "This model's maximum context length is 4096 tokens. However, your messages resulted in 9000 tokens in the "
        "messages.",
        None,
        None,
    ),
    (
        "Invalid 'max_output_tokens': integer below minimum value. Expected a value >= 16, but got 5 instead.",
        "request.max_tokens",
        "16",
    ),
    (
        "`temperature` and `top_p` cannot both be specified for this model. Please use only one.",
        "request.top_p",
        "",
    ),
    ("'response_format.type' must be 'json_schema' or 'text'", "request.response_format", ""),
    (
        "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
        "request.system",
        None,
    ),
    (
        "Unsupported value: 'temperature' does not support 0.0. Only the default (1) value is supported.",
        "request.temperature",
        "",
    ),
    ("Unsupported parameter: 'top_p' is not supported with this model.", "request.top_p", ""),
    ("Unknown (param: reasoning_effort)", "request.reasoning_effort", ""),
    ("Unsupported value: 'reasoning_effort' does not support 'xhigh'.", "request.reasoning_effort", ""),
    (
        "Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.",
        "request.response_format",
        "",
    ),
    (
        "Invalid schema for response_format 'answer': 'additionalProperties' is required to be false",
        "request.response_format.strict",
        "false",
    ),
    (STREAM_OPTIONS, "request.extra.stream_options", "{}"),
    ("This model only support stream mode, please enable the stream parameter", "request.stream", "true"),
    ("Streaming is not supported", "request.stream", "false"),
    ("'developer' is not one of ['system', 'assistant', 'user'] - 'messages.0.role'", ROLE, "system"),
    ("Unsupported value: 'messages[0].role' does not support 'developer' with this model.", ROLE, "system"),
    ("Unknown parameter: 'seed'.", "request.extra.seed", ""),
    ("body.top_k: Extra inputs are not permitted", "request.extra.top_k", ""),
    ("Unsupported parameter: 'stop'", "request.extra.stop", ""),
    ("This model's maximum context length is 8192 tokens", None, None),
    ("Invalid image: stop sending such", None, None),
    ("The model `x` does not exist", None, None),
    ("Please set a lower temperature if you like", None, None),
]


@pytest.mark.parametrize(("message", "setting", "value"), CURES)
def test_a_refused_parameter_names_its_setting(message: str, setting: str | None, value: str | None) -> None:
    cure = fix_for(f"HTTP 400: {message}")
    assert (cure and cure.setting) == setting
    assert (cure.value if cure else None) == value


@pytest.mark.parametrize(
    ("reason", "setting"),
    [
        ("HTTP 307: the server redirects to https://b.example/, and redirects are not followed", "endpoint.url"),
        (
            "ClientConnectorCertificateError: [SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate",
            "endpoint.ca_file",
        ),
        ("no answer for 60 s: the answer is not a chat completion, but a web page: Sign in", "endpoint.url"),
        ("the endpoint was never reached for 15 seconds: ClientConnectorDNSError: Cannot connect", "endpoint.url"),
        ("no answer for 600 seconds: ClientConnectorDNSError: Cannot connect", None),
        ("no answer for 60 s: HTTP 502: Bad Gateway", None),
    ],
)
def test_a_wrong_address_names_its_setting(reason: str, setting: str | None) -> None:
    cure = fix_for_address(reason)
    assert (cure and cure.setting) == setting


def refusing(parameter: str, message: str, unless: Any = ...) -> Script:
    """Requests with the parameter, but for this value of it, are refused with the message."""

    async def script(exchange: Exchange) -> None:
        body = json.loads(exchange.body)
        if parameter == "developer":
            refused = any(each["role"] == "developer" for each in body["messages"])
        else:
            refused = parameter in body and body[parameter] != unless
        if refused:
            said = json.dumps({"error": {"message": message, "param": parameter, "code": "unsupported"}}).encode()
            await exchange.send(answer(said, status="400 Bad Request"))
        else:
            await exchange.send(answer(answer_body()))

    return script


def next_command(ended: Ended) -> list[str]:
    """The arguments of the command that the closing lines print."""
    printed = re.search(r"^next +batchrun (.*)$", ended.stdout, re.MULTILINE)
    assert printed is not None, ended.stdout
    return shlex.split(printed[1])


TEMPERATURE = "Unsupported value: 'temperature' does not support 0.0. Only the default (1) value is supported."
REFUSALS: dict[str, tuple[Script, str, int]] = {
    # the server, more of the job, how many commands until the run is complete without a failure (one, for all)
    "max_tokens": (refusing("max_tokens", CURES[0][0]), "", 1),
    "a lower limit": (refusing("max_tokens", "max_tokens is too large: 40. At most 16 here", 16), "", 1),
    "temperature": (refusing("temperature", TEMPERATURE), "temperature = 0.0", 1),
    "stream_options": (refusing("stream_options", STREAM_OPTIONS), "stream = true", 1),
    "developer": (
        refusing("developer", "Unsupported value: 'messages[0].role' does not support 'developer'"),
        'extra = { stop = ["x"] }',
        1,
    ),
    "at least 16": (refusing("max_tokens", "max_tokens: Expected a value >= 41", 41), "", 1),
    "top_p": (
        refusing("top_p", "`temperature` and `top_p` cannot both be specified"),
        "temperature = 0.5\ntop_p = 0.9",
        1,
    ),
    "extra": (refusing("seed", "Unknown parameter: 'seed'."), "extra = { seed = 5 }", 1),
}


def job_of(folder: Path, url: str, rows: int, name: str, more: str) -> Path:
    job = write_job(folder / "my job.toml", url, write_rows(folder / "in.jsonl", rows))
    text = job.read_text().replace("max_tokens = 40", f"max_tokens = 40\n{more}")
    if name == "developer":
        message = '[[request.messages]]\nrole = "{}"\ncontent = "{}"\n'
        text = text.replace('prompt = "Say: {{ text }}"\n', "")
        text += message.format("developer", "Be brief.") + message.format("user", "Say: {{ text }}")
    job.write_text(text)
    return job


@pytest.mark.heavy
@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", REFUSALS)
def test_the_printed_command_cures_a_stopped_run(name: str, tmp_path: Path) -> None:
    script, more, commands = REFUSALS[name]
    with serving_aside(script) as server:
        job = job_of(tmp_path, server.url, 30, name, more)
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 2, ended.stdout + ended.stderr
        assert "fix " in ended.stdout
        for _ in range(commands):
            assert ended.exit_code in (2, 3), ended.stdout + ended.stderr
            ended = batchrun(*next_command(ended))
        assert ended.exit_code == 0, ended.stdout + ended.stderr
        assert len(server.exchanges) <= 2 * 8 + 10 + 30
    assert read_summary(tmp_path / "out")["by_status"] == {"ok": 30}


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["max_tokens", "temperature"])
def test_the_printed_command_cures_a_complete_run(name: str, tmp_path: Path) -> None:
    script, more, _ = REFUSALS[name]
    with serving_aside(script) as server:
        job = job_of(tmp_path, server.url, 4, name, more)
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 3
        assert batchrun(*next_command(ended), key=KEY).exit_code == 0
    assert read_summary(tmp_path / "out")["by_status"] == {"ok": 4}


def test_what_the_rows_bring_themselves_no_setting_cures() -> None:
    said = "HTTP 400: Unsupported parameter: 'temperature' is not supported with this model."
    for settings in ([], ["request.model", "request.from_columns.temperature"]):
        cure = fix_for(said, settings)
        assert cure is not None
        assert (cure.setting, cure.value) == ("temperature", None)
        assert "set by the rows of the input, not by the job" in cure.what
    set_by_the_job = fix_for(said, ["request.temperature"])
    assert set_by_the_job is not None
    assert set_by_the_job.value == ""
    schema = fix_for("Invalid schema for response_format 'answer'", ["request.response_format.type"])
    assert schema is not None
    assert schema.setting == "request.response_format.strict"
    field = fix_for("Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", [])
    assert field is not None
    assert field.setting == FIELD


def test_the_printed_command_resumes_a_new_run(tmp_path: Path) -> None:
    """Typed again, a command with --new would start a third run, and pay for all its rows."""
    with running_simulator(SimulatorConfig(latency_s=0)) as simulator:
        output = f'[output]\npath = "{tmp_path}/runs/{{date}}"'
        job = write_job(tmp_path / "job.toml", simulator.url, write_rows(tmp_path / "in.jsonl", 6), output)
        assert batchrun("run", job).exit_code == 0
        ended = batchrun("run", job, "--new", "--set", "budget.max_requests=2")
        assert ended.exit_code == 4, ended.stdout + ended.stderr
        printed = re.search(r"^next .*; resume with batchrun (.+)$", ended.stdout, re.MULTILINE)
        assert printed is not None, ended.stdout
        ended = batchrun(*shlex.split(printed[1]), "--set", "budget.max_requests=9")
        assert ended.exit_code == 0, ended.stdout + ended.stderr
        assert len(simulator.ledger()) == 12
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("flags", [(), ("--new",)])
def test_the_fixed_command_keeps_any_name(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """A shell reads the printed words as they were, although a name is not UTF-8."""
    source = write_rows(tmp_path / os.fsdecode(b"it's \xe9.jsonl"), 6)
    message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    with running_simulator(SimulatorConfig(faults=(Fault(kind="status", status=400, message=message),))) as simulator:
        output = f'[output]\npath = "{tmp_path}/runs/{{date}}"'
        job = write_job(tmp_path / "job.toml", simulator.url, "in.jsonl", output)
        ended = batchrun("run", job, "-i", source, *flags)
    (printed,) = re.findall(r"^next +(batchrun run .+)$", ended.stdout, re.MULTILINE)
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {printed}"], check=True, capture_output=True).stdout
    assert os.fsencode(source) in words.split(b"\0")
    assert "--new" not in printed


@pytest.mark.parametrize(("given", "flags"), [("4", 1), ("400", 2)])
def test_a_fix_is_named_once_in_the_command(given: str, flags: int) -> None:
    """A setting that only begins like the fix is not the fix."""
    line = ["batchrun", "run", "job.toml", "--set", f"request.max_tokens={given}"]
    command = command_with(line, Fix("request.max_tokens", "at most 4 here", "4"), retry=True)
    assert command.count("--set request.max_tokens=") == flags
    assert "--set request.max_tokens=4 " in command
