"""Columns with any name in a template, nulls in it, and text files with a byte order mark."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from batchrun import credentials
from batchrun.errors import InputError, JobError
from batchrun.job.load import load
from batchrun.job.settings import Endpoint
from batchrun.request.templates import text_template


def rendered(text: str, columns: dict[str, Any]) -> str:
    return text_template(text, "request.prompt")(columns)


@pytest.mark.parametrize(
    "name", ["customer name", "e-mail", "\U0001f600", "if", "true", "items", "self", "1st", "row", "ä"]
)
def test_a_column_with_any_name_is_in_reach(name: str) -> None:
    columns = {name: "here"}
    assert rendered("{{ row }}" if name == "row" else f'{{{{ row["{name}"] }}}}', columns) == "here"
    assert columns == {name: "here"}


def test_an_unparsable_template_shows_the_syntax() -> None:
    with pytest.raises(JobError, match=r"template error .*\{\{ row\['its name'\] \}\}"):
        text_template("{{ customer name }}", "request.prompt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ customer-name }}", "did you mean row['customer-name']? (columns: customer-name, text)"),
        ("{{ txt }}", "did you mean text? (columns: customer-name, text)"),
        ('{{ row["texts"] }}', "did you mean text? (columns: customer-name, text)"),
    ],
)
def test_a_missing_column_lists_the_others(text: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        rendered(text, {"customer-name": "x", "text": "y"})
    assert str(error.value).endswith(said)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (False, "false"), (None, ""), ("", "")])
@pytest.mark.parametrize("quotes", ['"', "'", '"""', "'''"])
def test_null_proposals_fit_any_toml_string(quotes: str, value: object, text: str) -> None:
    """The proposal is pasted into the job file as it stands. Of the values only null becomes empty."""
    with pytest.raises(InputError) as error:
        rendered("{{ n }}", {"n": None})
    proposed = str(error.value).partition("write ")[2].partition(" where")[0]
    pasted = tomllib.loads(f"prompt = {quotes}{proposed}{quotes}")["prompt"]
    assert rendered(pasted, {"n": value}) == text


@pytest.mark.parametrize("name", ["customer-name", "it's", 'a"b', "a\\b", "a\nb"])
def test_proposed_columns_are_in_reach(name: str) -> None:
    """In the usual double quotes too, unless the name itself has quotes."""
    with pytest.raises(InputError) as error:
        rendered("{{ " + re.split(r"\W", name)[0] + " }}", {name: "here"})
    proposed = str(error.value).partition("did you mean ")[2].partition("? (columns")[0]
    assert rendered("{{ " + proposed + " }}", {name: "here"}) == "here"
    if name == "customer-name":
        assert tomllib.loads(f'prompt = "{{{{ {proposed} }}}}"')


def test_files_may_begin_with_a_bom(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    schema, key, job = tmp_path / "s.json", tmp_path / "key", tmp_path / "job.toml"
    schema.write_bytes(mark + b'{"type": "object"}')
    key.write_bytes(mark + b"sk-123456789")
    key.chmod(0o600)
    job.write_bytes(
        mark
        + f"""[endpoint]
url = "https://host/v1"
api_key_file = "{key}"
[request]
model = "m"
prompt = "x"
response_format = {{ type = "json_schema", name = "n", file = "{schema}" }}
""".encode()
    )
    loaded = load(job)
    assert loaded.request.response_format is not None
    assert loaded.request.response_format.schema == {"type": "object"}
    endpoint: Endpoint = loaded.endpoint
    assert credentials.read(endpoint, {}).headers["Authorization"] == "Bearer sk-123456789"
