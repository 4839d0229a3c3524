"""The files in sample_inputs/ are what their README says they are."""

import re
import struct
from pathlib import Path

import jsonschema
import msgspec
import pyarrow.parquet as pq
import pytest

SAMPLES = Path(__file__).parents[2] / "sample_inputs"
JSONL = sorted(SAMPLES.glob("*.jsonl"))
PARQUET = sorted(SAMPLES.glob("*.parquet"))
ID_COLUMNS = {
    "batch": "custom_id",
    "changes": "change_id",
    "chats": "chat_id",
    "functions": "function_id",
    "passages": "passage_id",
    "pictures": "picture_id",
}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "additionalProperties": False,
        "properties": {
            "role": {"enum": ["user", "assistant", "system", "developer"]},
            "content": {"type": "string", "minLength": 1},
        },
    },
}
# docs/api.md, "Request": the fields the samples use, no others.
BATCH_LINE = {
    "type": "object",
    "required": ["custom_id", "method", "url", "body"],
    "additionalProperties": False,
    "properties": {
        "custom_id": {"type": "string", "minLength": 1},
        "method": {"const": "POST"},
        "url": {"const": "/v1/chat/completions"},
        "body": {
            "type": "object",
            "required": ["model", "messages"],
            "additionalProperties": False,
            "properties": {
                "model": {"const": "vtrix-gpt-5.3-codex"},
                "messages": MESSAGES,
                "max_tokens": {"type": "integer", "minimum": 1, "maximum": 128_000},
            },
        },
    },
}


def rows_of(path: Path) -> list[dict[str, object]]:
    return [msgspec.json.decode(line, type=dict[str, object]) for line in path.read_bytes().splitlines()]


def readme_rows() -> dict[str, int]:
    """File name → row count, from the README's first table."""
    counts = {}
    for names, count in re.findall(r"^\| (`[^|]+`) \| (\d+) \|", (SAMPLES / "README.md").read_text("utf-8"), re.M):
        for name in re.findall(r"`([^`]+)`", names):
            counts[name] = int(count)
    return counts


@pytest.mark.parametrize("path", PARQUET, ids=lambda path: path.name)
def test_jsonl_and_parquet_hold_the_same_rows(path: Path) -> None:
    assert pq.read_table(path).to_pylist() == rows_of(path.with_suffix(".jsonl"))


def test_readme_lists_every_file_with_its_row_count() -> None:
    counted = {path.name: len(rows_of(path)) for path in JSONL}
    counted |= {path.name: pq.read_metadata(path).num_rows for path in PARQUET}
    assert len(counted) == 9
    assert readme_rows() == counted


@pytest.mark.parametrize("path", JSONL, ids=lambda path: path.name)
def test_the_readme_names_every_column(path: Path) -> None:
    tables = (SAMPLES / "README.md").read_text("utf-8").split("## Columns")[1].split(f"**{path.stem}**")[1]
    columns = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+`) \|", tables.split("\n**")[0], re.M)))
    assert columns
    assert all(sorted(row) == sorted(columns) for row in rows_of(path))


@pytest.mark.parametrize("path", JSONL, ids=lambda path: path.name)
def test_ids_are_unique_and_nothing_is_null(path: Path) -> None:
    rows = rows_of(path)
    assert len({row[ID_COLUMNS[path.stem]] for row in rows}) == len(rows)
    assert all(value is not None and value != "" for row in rows for value in row.values())


def test_the_sample_files_stay_small() -> None:
    sizes_bytes = [path.stat().st_size for path in SAMPLES.rglob("*") if path.suffix in (".jsonl", ".parquet")]
    assert max(sizes_bytes) <= 600_000
    assert sum(sizes_bytes) <= 1_500_000


def test_batch_lines_are_requests_the_api_takes() -> None:
    for row in rows_of(SAMPLES / "batch.jsonl"):
        jsonschema.validate(row, BATCH_LINE)


def test_chats_are_conversations_waiting_for_the_assistant() -> None:
    lengths = set()
    for row in rows_of(SAMPLES / "chats.jsonl"):
        jsonschema.validate(row["messages"], MESSAGES)
        messages = msgspec.convert(row["messages"], list[dict[str, str]])
        assert messages[0]["role"] == "system"
        assert messages[-1]["role"] == "user"
        lengths.add(len(messages))
    assert lengths == {2, 4}


def test_pictures_are_small_png_images() -> None:
    for row in rows_of(SAMPLES / "pictures.jsonl"):
        png = (SAMPLES / "pictures" / str(row["image"])).read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert struct.unpack(">II", png[16:24]) == (32, 32)  # the header chunk comes first (PNG, section 5.6)
    named = sorted(str(row["image"]) for row in rows_of(SAMPLES / "pictures.jsonl"))
    assert named == sorted(path.name for path in (SAMPLES / "pictures").iterdir())


def test_functions_compile_on_their_own() -> None:
    for row in rows_of(SAMPLES / "functions.jsonl"):
        source = str(row["source"])
        assert row["lines"] == len(source.splitlines())
        compile(source, str(row["function_id"]), "exec")


def test_licence_texts_are_beside_the_samples() -> None:
    readme = (SAMPLES / "README.md").read_text("utf-8")
    linked = set(re.findall(r"\((licenses/[^)]+)\)", readme))
    assert linked == {f"licenses/{path.name}" for path in (SAMPLES / "licenses").iterdir()}
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (SAMPLES / "licenses" / "python.txt").read_text("utf-8")
