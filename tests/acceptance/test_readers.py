"""Results open in the tools that people have, with money to the last digit: DuckDB, pandas, polars, Hugging Face.

They run in an environment of their own (`make readers`): numpy beside pyarrow would change what the other tests test.
"""

import os
import subprocess
from decimal import Decimal
from pathlib import Path

import pytest

from tests.result_files import row, write_result

PYTHON = Path(__file__).parents[2] / ".venv/readers/bin/python"
LABELS = ("good", "bad", "mixed")
ROWS = 200
SUM = sum((Decimal(number) / 10**12 + Decimal("0.1") for number in range(ROWS) if number != 7), Decimal(0))

PROGRAMS = {
    "duckdb": """
import duckdb
counts = "sum(cost_usd), count(error.kind), count(*) FILTER (parsed.label = 'bad')"
print(*duckdb.sql(f"SELECT {counts} FROM '{path}'").fetchall()[0])
""",
    "pandas": """
import pandas
rows = pandas.read_parquet(path)
assert rows["finished_at"].dt.tz is not None
labels = [parsed["label"] for parsed in rows["parsed"]]
print(rows["cost_usd"].dropna().sum(), rows["error"].notna().sum(), labels.count("bad"))
""",
    "polars": """
import polars
rows = polars.scan_parquet(path).collect()
labels = rows["parsed"].struct.field("label")
print(rows["cost_usd"].sum(), rows["error"].is_not_null().sum(), (labels == "bad").sum())
""",
    "datasets": """
import datasets, tempfile
rows = datasets.Dataset.from_parquet(path, cache_dir=tempfile.mkdtemp())
cost = sum(each for each in rows["cost_usd"] if each is not None)
labels = [parsed["label"] for parsed in rows["parsed"]]
print(cost, sum(each is not None for each in rows["error"]), labels.count("bad"))
""",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = []
    for number in range(ROWS):
        usd = Decimal(number) / 10**12 + Decimal("0.1")
        parsed = {"label": LABELS[number % 3], "score": number / 2, "note": None}
        error = {"kind": "quota", "http_status": 429, "code": None, "message": "no"} if number % 50 == 0 else None
        rows.append(row(number, cost_usd=None if number == 7 else usd, answer_cost_usd=usd, parsed=parsed, error=error))
    return write_result(tmp_path_factory.mktemp("readers") / "run", rows, typed=True) / "completions.parquet"


@pytest.mark.skipif(not PYTHON.exists(), reason="make readers installs what opens results")
@pytest.mark.parametrize("reader", PROGRAMS)
def test_results_open_with_money_to_the_last_digit(result: Path, tmp_path: Path, reader: str) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(tmp_path)}
    code = f"path = {str(result)!r}\n{PROGRAMS[reader]}"
    reported = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, env={**os.environ, **offline, "TMPDIR": str(tmp_path)}
    )
    assert reported.stdout.split() == [str(SUM), "4", "67"], reported.stderr
