"""Imports go one way, `cli → start → invocation → stages → job, prices → records, errors`, libraries to one place."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "batchrun"

LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"expected"}),
    frozenset({"records", "mistakes"}),
    frozenset({"job"}),
    frozenset({"prices", "credentials"}),
    frozenset(
        {
            *("source", "ids", "json_columns", "schema_columns", "window"),
            *("request", "check", "fields", "templates", "image_parts", "images", "image_digests"),
            *("accounts", "admission", "gate", "gate_state", "purse"),
            *("pace", "accepted", "rate_headers", "learned", "daily", "outage", "capacity"),
            *("deadline", "forecast"),
            *("client", "stream", "sse", "packed", "answer", "policy", "offline"),
            *("durable", "rundir", "runlog", "slots", "spent", "spill", "wal", "database", "tables", "checkpoint"),
            *("chunks", "base_part", "backlog", "ended", "output", "matching", "completions", "delivery"),
        }
    ),
    frozenset({"variants", "facts", "result", "drift", "spooled", "plan", "retry", "pipeline"}),
    frozenset(
        {
            *("signals", "summary", "progress", "control", "chronicle", "memory", "heartbeat", "asking", "invocation"),
            *("replay", "look", "estimate"),
        }
    ),
    frozenset({"rescue"}),
    frozenset({"report", "simulated", "simulator", "terminal"}),
    frozenset({"start"}),
    frozenset({"runner"}),
    frozenset({"__init__", "cli"}),
)
"""From the ground up. A module imports those of lower layers, and of its own layer only what is listed below."""

WITHIN_A_LAYER: dict[str, frozenset[str]] = {
    # what each stage is made of
    "gate": frozenset({"accounts", "admission", "daily", "gate_state", "pace", "purse", "rate_headers"}),
    "pace": frozenset({"accepted", "accounts", "admission", "rate_headers"}),
    "purse": frozenset({"admission"}),
    "capacity": frozenset({"admission", "daily"}),
    "gate_state": frozenset({"admission", "outage"}),
    "forecast": frozenset({"admission"}),
    "client": frozenset({"packed", "stream"}),
    "stream": frozenset({"answer", "packed", "sse"}),
    "answer": frozenset({"packed", "sse"}),
    "offline": frozenset({"answer"}),
    "policy": frozenset({"answer", "packed"}),
    "database": frozenset({"durable", "wal"}),
    "tables": frozenset({"database"}),
    "checkpoint": frozenset({"database", "durable", "spent", "spill", "tables"}),
    "rundir": frozenset({"durable"}),
    "slots": frozenset({"durable"}),
    "spill": frozenset({"durable"}),
    "window": frozenset({"durable", "json_columns", "source"}),
    "request": frozenset({"fields", "image_parts", "templates"}),
    "templates": frozenset({"image_parts"}),
    "images": frozenset({"image_parts"}),
    "image_digests": frozenset({"durable"}),
    "check": frozenset({"ids", "images", "json_columns", "request", "source"}),
    "base_part": frozenset({"output", "tables"}),
    "chunks": frozenset(
        {
            *("base_part", "checkpoint", "json_columns", "output", "packed", "rundir", "schema_columns", "source"),
            *("tables", "window"),
        }
    ),
    "backlog": frozenset({"chunks", "policy"}),
    "ended": frozenset({"backlog", "offline", "policy"}),
    "completions": frozenset({"output"}),
    "delivery": frozenset({"chunks", "completions", "packed"}),
    "output": frozenset({"answer", "durable", "packed", "schema_columns"}),
    # how they are joined
    "matching": frozenset({"durable"}),
    "result": frozenset({"facts"}),
    "drift": frozenset({"facts", "result"}),
    "spooled": frozenset({"facts"}),
    "plan": frozenset({"drift", "facts", "spooled", "variants"}),
    "retry": frozenset({"plan", "result"}),
    "pipeline": frozenset({"plan", "variants"}),
    "chronicle": frozenset({"summary"}),
    "progress": frozenset({"summary"}),
    "control": frozenset({"summary"}),
    "heartbeat": frozenset({"chronicle", "control", "memory", "summary"}),
    "asking": frozenset({"chronicle", "heartbeat", "memory", "signals", "summary"}),
    "invocation": frozenset({"asking", "replay", "chronicle", "control", "signals", "summary"}),
    "look": frozenset({"summary"}),
    "estimate": frozenset({"summary"}),
    "simulated": frozenset({"simulator"}),
}

SOLE_IMPORTERS: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"client", "simulator"}),
    "aiolimiter": frozenset({"gate"}),
    "sqlite3": frozenset({"database"}),
    "click": frozenset({"cli"}),
    "tqdm": frozenset({"terminal"}),
    "uvloop": frozenset({"start", "simulator"}),
    "jinja2": frozenset({"templates"}),
    "genai_prices": frozenset({"prices"}),
    "jsonschema_rs": frozenset({"expected"}),
    "toktok": frozenset({"offline"}),
    "pyarrow": frozenset(
        {
            *(
                "source",
                "json_columns",
                "schema_columns",
                "window",
                "base_part",
                "chunks",
                "drift",
                "output",
                "plan",
                "result",
            ),
            *("completions", "delivery", "replay"),
            "rescue",
        }
    ),
}


def modules() -> Iterator[tuple[str, Path]]:
    """Every file with the module it counts as: a package within the package is one."""
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE)
        yield place.parts[0].removesuffix(".py"), file


@cache
def imported(file: Path) -> tuple[str, ...]:
    """The dotted name of everything that the file imports, wherever in it that stands."""
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(names)


def edges() -> dict[str, set[str]]:
    """Module → the modules of ours that it imports."""
    graph: dict[str, set[str]] = {module: set() for module, _ in modules()}
    for module, file in modules():
        for name in imported(file):
            first, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if first == "batchrun" and target in graph and target != module:
                graph[module].add(target)
    return graph


EDGES = edges()


def layer_of(module: str) -> int:
    return next(place for place, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_its_layer() -> None:
    assert sorted(EDGES) == sorted(module for layer in LAYERS for module in layer)


@pytest.mark.parametrize("module", sorted(EDGES))
def test_a_module_imports_lower_layers_and_of_its_own_only_what_is_listed(module: str) -> None:
    beside = {target for target in EDGES[module] if layer_of(target) == layer_of(module)}
    above = {target for target in EDGES[module] if layer_of(target) > layer_of(module)}
    assert above == set()
    assert beside == WITHIN_A_LAYER.get(module, frozenset())


def test_no_two_modules_import_each_other_by_any_way() -> None:
    TopologicalSorter(EDGES).prepare()
    assert set(EDGES) - set().union(*EDGES.values()) == {"__init__", "cli"}


def test_the_simulator_knows_nothing_of_the_client_it_judges() -> None:
    assert EDGES["simulator"] <= {"errors"}
    assert {module for module, targets in EDGES.items() if "simulator" in targets} == {"cli", "simulated"}


@pytest.mark.parametrize("library", SOLE_IMPORTERS)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {module for module, file in modules() for name in imported(file) if name.partition(".")[0] == library}
    assert users == SOLE_IMPORTERS[library]


def test_only_the_client_opens_connections() -> None:
    names = {name for _, file in modules() if file.name != "client.py" for name in imported(file)}
    assert {name for name in names if name.startswith("aiohttp")} <= {"aiohttp.web"}


def test_the_command_line_starts_without_anything_heavy() -> None:
    heavy = (
        "pyarrow",
        "aiohttp",
        "jinja2",
        "msgspec",
        "tqdm",
        "sqlite3",
        "genai_prices",
        "jsonschema_rs",
        "aiolimiter",
        "uvloop",
        "asyncio",
    )
    code = f"import sys, batchrun.cli; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[]\n"
