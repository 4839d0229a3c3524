"""docs/cost.md answers finance's ten questions: each by one command, whose output is what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from tests import finance_runs
from tests.cli_process import batchrun

PAGE = Path(__file__).parents[2] / "docs" / "cost.md"
ANSWERS = re.findall(r"^    \$ batchrun (.+)\n((?:    .*\n)*)", PAGE.read_text("utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finance")
    finance_runs.write(folder)
    return folder


def test_the_page_answers_ten_questions() -> None:
    assert len(ANSWERS) == 10


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("command", "shown"), ANSWERS, ids=[command for command, _ in ANSWERS])
def test_each_is_answered_as_the_page_says(folder: Path, command: str, shown: str) -> None:
    ended = batchrun(*shlex.split(command), cwd=folder)
    assert ended.stderr == ""
    assert ended.stdout == re.sub(r"^    ", "", shown, flags=re.MULTILINE)
    assert ended.exit_code == 0
