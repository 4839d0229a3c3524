"""What a server or a model writes is only text: it steers no terminal, no spreadsheet and no later start."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest

from batchrun.report import formats
from tests.bills import bill_over
from tests.cli_process import batchrun, write_job, write_rows
from tests.crash.test_network_faults import run
from tests.endings import answer_body
from tests.fault_server import Exchange, answer, serving_aside, serving_moved

HOSTILE = "\x1b]52;c;Y2FuYXJ5\x07 \x1b[2J\x1b[31m \u202egnp.exe \u2066x\u2069 \x9b31m \x08\x08\rall rows done \x00"
"""OSC 52 (writes the clipboard), CSI (clears, colours), bidirectional overrides, C1's one-byte CSI, a return."""


def steering(text: str) -> set[str]:
    """The characters that a terminal obeys instead of showing."""
    return {char for char in text if char != "\n" and unicodedata.category(char) in ("Cc", "Cf")}


@pytest.mark.parametrize("status", ["200 OK", "401 Unauthorized"])
def test_a_hostile_server_cannot_steer_the_terminal(tmp_path: Path, status: str) -> None:
    error = b'{"error": {"message": "%s", "code": "x"}}' % HOSTILE.encode("unicode_escape").replace(b"\\x", b"\\u00")

    async def hostile(exchange: Exchange) -> None:
        body = answer_body(HOSTILE, model=HOSTILE) if status.startswith("200") else error
        await exchange.send(answer(body, status=status))

    source, out = write_rows(tmp_path / "in.jsonl", 12), tmp_path / "out"
    with serving_aside(hostile) as server:
        job = write_job(tmp_path / "job.toml", server.url, source)
        ended = [batchrun("run", job, "-o", out), batchrun("status", out)]
    said = "".join(end.stdout + end.stderr for end in ended)
    assert steering(said) == set()
    assert "gnp.exe" in said, "nothing of it was said, so nothing was tested"


def test_a_model_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "Hi", "kind": HOSTILE}) + "\n", "utf-8")
    more = f'[request.from_columns]\nmodel = "kind"\n[pricing.{json.dumps(HOSTILE)}]\ninput = 1\noutput = 2\n'
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", source, more)
    for command in ("check", "estimate"):
        ended = batchrun(command, job)
        assert ended.exit_code == 0, ended.stderr
        assert steering(ended.stdout + ended.stderr) == set()
        assert "gnp.exe" in ended.stdout


def test_no_cell_of_a_report_is_a_formula(tmp_path: Path) -> None:
    async def answers(exchange: Exchange) -> None:
        await exchange.send(answer(answer_body("fine")))

    names = ("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "\t=1", "plain")
    with serving_moved(answers) as server:
        for number, name in enumerate(names):
            (folder := tmp_path / str(number)).mkdir()
            run(folder, server, 1, request={"model": name})
    bill = bill_over([tmp_path / str(number) / "out" for number in range(len(names))], ("model",))
    cells = [cell for line in csv.reader(io.StringIO(formats.render(bill, "csv").decode())) for cell in line]
    assert {"'=HYPERLINK(1)", "'+1", "'-1", "'@SUM(1)", "'\t=1", "plain"} <= set(cells)
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
