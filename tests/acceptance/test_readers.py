"""Results open in the tools that people have, with money to the last digit: DuckDB, pandas, polars, Hugging Face.

They run in an environment of their own (`make readers`): numpy beside pyarrow would change what the other tests test.
"""

import os
import subprocess
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.tables import json_lines, partitioned
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
        status = "ok" if error is None else "error"
        rows.append(
            row(
                number,
                status=status,
                cost_usd=None if number == 7 else usd,
                answer_cost_usd=usd,
                parsed=parsed,
                error=error,
            )
        )
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


# ── other layouts ─────────────────────────────────────────────────────────────────────────────────────────────────────

OF_LAYOUTS = {
    "pyarrow": """
import pyarrow.dataset as ds
for folder in (parts, partitions):
    table = ds.dataset(folder, partitioning="hive").to_table()
    print(sum(filter(None, table["cost_usd"].to_pylist())), table.num_rows)
table = ds.dataset(partitions, partitioning="hive").to_table(filter=ds.field("status") == "error")
print(0, table.num_rows)
""",
    "duckdb": """
import duckdb
by_key = f"read_parquet('{partitions}/**/*.parquet', hive_partitioning = true)"
for rows in (f"'{parts}/*.parquet'", by_key, f"'{lines}'"):
    print(*duckdb.sql(f"SELECT sum(cost_usd::DECIMAL(20, 12)), count(*) FROM {rows}").fetchall()[0])
print(0, duckdb.sql(f"SELECT count(*) FROM {by_key} WHERE status = 'error'").fetchall()[0][0])
""",
    "pandas": """
import decimal, pandas
for folder in (parts, partitions):
    rows = pandas.read_parquet(folder)
    print(rows["cost_usd"].dropna().sum(), len(rows))
rows = pandas.read_json(lines, lines=True, dtype={"cost_usd": str})
print(sum(map(decimal.Decimal, rows["cost_usd"].dropna())), len(rows))
print(0, (pandas.read_parquet(partitions)["status"] == "error").sum())
""",
    "polars": """
import polars
for folder in (parts, partitions):
    rows = polars.scan_parquet(f"{folder}/**/*.parquet", hive_partitioning=True).collect()
    print(rows["cost_usd"].sum(), len(rows))
rows = polars.read_ndjson(lines, infer_schema_length=None)
print(rows["cost_usd"].str.to_decimal(scale=12).sum(), len(rows))
rows = polars.scan_parquet(f"{partitions}/**/*.parquet", hive_partitioning=True)
print(0, rows.filter(polars.col("status") == "error").collect().height)
""",
    "datasets": """
import datasets, tempfile
cache = tempfile.mkdtemp()
for kind, files in (("parquet", f"{parts}/*.parquet"), ("parquet", f"{partitions}/**/*.parquet"), ("json", lines)):
    rows = datasets.load_dataset(kind, data_files=files, split="train", cache_dir=cache)
    from decimal import Decimal
    print(sum(Decimal(each) for each in rows["cost_usd"] if each is not None), len(rows))
print(0, 4)
""",
}


@pytest.mark.skipif(not PYTHON.exists(), reason="make readers installs what opens results")
@pytest.mark.parametrize("reader", OF_LAYOUTS)
def test_other_tools_open_every_layout(result: Path, tmp_path: Path, reader: str) -> None:
    """A folder of parts and one of partitions, each with its manifest, and JSON lines."""
    table = pq.read_table(result, partitioning=None)
    for folder in ("parts", "partitions"):
        (tmp_path / folder).mkdir()
    for number in range(4):
        pq.write_table(table.slice(number * 50, 50), tmp_path / "parts" / f"part-00000{number}.parquet")
    partitioned.write(iter(table.to_batches()), table.schema, ["status"], tmp_path / "partitions", "zstd")
    for folder in ("parts", "partitions"):
        (tmp_path / folder / "_manifest.json").write_text('{"version": 1}')
    lines = tmp_path / "completions.jsonl.gz"
    json_lines.write(lines, table.schema, table.to_batches(), ROWS)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(tmp_path / "home")}
    places = {name: str(tmp_path / name) for name in ("parts", "partitions")} | {"lines": str(lines)}
    code = "".join(f"{name} = {place!r}\n" for name, place in places.items()) + OF_LAYOUTS[reader]
    done = subprocess.run(
        [PYTHON, "-c", code], capture_output=True, text=True, env={**os.environ, **offline, "TMPDIR": str(tmp_path)}
    )
    *sums, failed = done.stdout.splitlines() or [done.stderr]
    assert sums == [f"{SUM} {ROWS}"] * len(sums), done.stderr
    assert len(sums) == (2 if reader == "pyarrow" else 3)
    assert failed == "0 4"
