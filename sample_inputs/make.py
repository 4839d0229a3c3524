"""Makes every file of this folder again from five Debian packages; the same packages give the same rows.

    apt-get download python3.11 libpython3.11-minimal libpython3.11-stdlib r-cran-janeaustenr tango-icon-theme
    for package in *.deb; do dpkg-deb -x "$package" packages; done
    python sample_inputs/make.py packages

README.md beside this file says what each file holds, which package versions it was made from, and under which licence.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
from packages import ICONS, LICENSES, Function, Passage, changes, functions, passages, pictures, spread

HERE = Path(__file__).parent
MODEL = "vtrix-gpt-5.3-codex"


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class Chat(msgspec.Struct, frozen=True):
    """A conversation that waits for the assistant's next turn."""

    chat_id: str
    messages: tuple[Message, ...]


class Body(msgspec.Struct, frozen=True):
    model: str
    messages: tuple[Message, ...]
    max_tokens: int


class BatchLine(msgspec.Struct, frozen=True):
    """One line of the format that providers' own batch services take."""

    custom_id: str
    method: str
    url: str
    body: Body


def batch(rows: Sequence[Passage], count: int = 30) -> list[BatchLine]:
    """Requests for a one-sentence summary of `count` of the passages."""
    system = Message("system", "You summarise passages from novels in one plain sentence of at most 25 words.")
    return [
        BatchLine(
            custom_id=row.passage_id,
            method="POST",
            url="/v1/chat/completions",
            body=Body(MODEL, (system, Message("user", f"From {row.book}, chapter {row.chapter}:\n\n{row.text}")), 400),
        )
        for row in spread(rows, count)
    ]


def chats(rows: Sequence[Function], count: int = 30) -> list[Chat]:
    """Questions on `count` of the functions; every second conversation has a question and answer behind it."""
    return [
        Chat(f"chat-{number:02}", turns(row, with_history=number % 2 == 0))
        for number, row in enumerate(spread(rows, count), 1)
    ]


def turns(row: Function, *, with_history: bool) -> tuple[Message, ...]:
    """A system turn, then one question, or a question, its answer (read off the row, so it is true) and a follow-up."""
    system = Message("system", "You are a patient Python teacher. Answer in at most 80 words.")
    code = f"```python\n{row.source}\n```"
    if not with_history:
        return system, Message("user", f"What does this function do, and when would I call it?\n\n{code}")
    return (
        system,
        Message("user", f"Where does this function come from?\n\n{code}"),
        Message(
            "assistant",
            f"It is `{row.name}` from the standard library's `{row.module}` module, {row.lines} lines long.",
        ),
        Message("user", "Name one input for which it would surprise a beginner, and say why."),
    )


def write_jsonl(name: str, rows: Sequence[msgspec.Struct]) -> None:
    """`name`.jsonl holds the rows, one to a line, as UTF-8."""
    (HERE / f"{name}.jsonl").write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
    print(f"{name}: {len(rows)} rows")


def write_both(name: str, rows: Sequence[msgspec.Struct]) -> None:
    """`name`.jsonl and `name`.parquet hold the same rows and columns."""
    write_jsonl(name, rows)
    table = pa.Table.from_pylist([msgspec.structs.asdict(row) for row in rows])
    pq.write_table(table, HERE / f"{name}.parquet", compression="zstd", compression_level=19)


def write_pictures(folder: Path) -> None:
    """`pictures.jsonl` names the files in `pictures/`, which are byte for byte the package's."""
    rows = pictures(folder)
    (HERE / "pictures").mkdir(exist_ok=True)
    for row in rows:
        shutil.copyfile(folder / ICONS / row.image, HERE / "pictures" / row.image)
    write_jsonl("pictures", rows)


def main(folder: Path) -> None:
    """Every data file and licence text of this folder is as new."""
    function_rows = functions(folder)
    passage_rows = passages(folder)
    write_both("changes", changes(folder))
    write_both("functions", function_rows)
    write_both("passages", passage_rows)
    write_pictures(folder)
    write_jsonl("batch", batch(passage_rows))
    write_jsonl("chats", chats(function_rows))
    for name, source in LICENSES.items():
        shutil.copyfile(folder / source, HERE / "licenses" / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python sample_inputs/make.py FOLDER   (the folder that the packages were unpacked into)")
    main(Path(sys.argv[1]))
