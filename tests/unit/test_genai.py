"""The attributes of requests follow the conventions, and their number is bounded."""

import msgspec
import pytest

from batchrun.records import RowError, Status
from batchrun.telemetry.genai import MOST_SETS, AttributeSets, error_type, job_attributes, provider
from tests.endings import MODEL, completion, discarded
from tests.jobs import job_over


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("api.openai.com", "openai"),
        ("my-team.openai.azure.com", "azure.ai.openai"),
        ("bedrock-runtime.us-east-1.amazonaws.com", "aws.bedrock"),
        ("api.x.ai", "x_ai"),
        ("api.max.ai", "openai"),
        ("localhost", "openai"),
        ("", "openai"),
    ],
)
def test_a_known_host_is_its_provider(host: str, name: str) -> None:
    assert provider(host) == name


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("https://api.groq.com/openai/v1", {"server.address": "api.groq.com", "server.port": 443}),
        ("http://[::1]:8080/v1", {"server.address": "::1", "server.port": 8080}),
        ("http://127.0.0.1/v1", {"server.address": "127.0.0.1", "server.port": 80}),
        ("simulator", {}),
    ],
)
def test_the_server_is_named_by_the_url(url: str, server: dict[str, object]) -> None:
    attributes = job_attributes(job_over(None, endpoint={"url": url, "auth": "none"}))
    assert {name: value for name, value in attributes.items() if name.startswith("server.")} == server
    assert attributes["gen_ai.operation.name"] == "chat"


def test_several_endpoints_name_no_server() -> None:
    job = job_over(None, endpoint={"url": "https://api.groq.com/openai/v1", "auth": "none"})
    other = msgspec.structs.replace(job.endpoint, url="https://api.openai.com/v1")
    attributes = job_attributes(msgspec.structs.replace(job, more_endpoints=[other]))
    assert "server.address" not in attributes
    assert attributes["gen_ai.provider.name"] == "openai"


def test_an_error_has_its_status_or_its_kind() -> None:
    assert error_type(completion(0)) is None
    assert error_type(completion(0, status=Status.TRUNCATED)) is None
    refused = completion(0, status=Status.ERROR, http_status=400, error=RowError("bad_request", 400))
    assert error_type(refused) == "400"
    invalid = completion(0, status=Status.INVALID, http_status=200, error=RowError("schema", 200))
    assert error_type(invalid) == "schema"
    assert error_type(discarded(0, http_status=None, error_kind="timeout")) == "timeout"
    assert error_type(discarded(0, http_status=429, error_kind="rate_limit")) == "429"


def test_attribute_sets_are_made_once_and_bounded() -> None:
    sets = AttributeSets({"gen_ai.operation.name": "chat"})
    first = sets.of(completion(0))
    assert sets.of(completion(1)) is first
    assert first[0]["gen_ai.request.model"] == MODEL
    assert [each.get("gen_ai.token.type") for each in first] == [None, "input", "output"]
    for number in range(3 * MOST_SETS):
        last = sets.of(completion(number, model=f"m{number}"))
    assert last[0]["gen_ai.request.model"] == "(other)"
    assert len(sets._known) <= MOST_SETS + 1
