"""JSON Schemas of requests: validated once each, and ready to validate parts of an answer. PURE.

`jsonschema_rs` validates. This module adds what drawing a value needs: a validator for any part of a schema, and the
target of a reference.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import jsonschema_rs
import msgspec

from batchrun.simulator.refusal import Refused

Schema = Mapping[str, Any]

_PART = "part of the simulator"  # a name that no one else gives to a definition
_ROOT = "urn:simulator:schema"


class CompiledSchema:
    """A valid JSON Schema, 2020-12 or the draft that its `$schema` names. References stay within it."""

    def __init__(self, root: dict[str, Any]) -> None:
        """Raises: ValueError: it is not a JSON Schema, or refers to something outside of it."""
        self.root = root
        self._parts: dict[bytes, jsonschema_rs.Validator] = {}
        jsonschema_rs.validator_for(root, offline=True, validate_formats=False)

    def fits(self, value: object, part: Schema | bool) -> bool:
        """Whether a JSON value satisfies `part`, whose references lead into the whole schema. `format` is ignored."""
        if isinstance(part, bool):
            return part
        key = msgspec.json.encode(part)
        if (validator := self._parts.get(key)) is None:
            # The part becomes one of the schema's own definitions, so that its references need no rewriting.
            whole = {**self.root, "$defs": {**self.root.get("$defs", {}), _PART: part}}
            whole.pop("$id", None)
            registry = jsonschema_rs.Registry([(_ROOT, whole)], retriever=_fetch_nothing)
            reference = {"$ref": f"{_ROOT}#/$defs/{_PART.replace(' ', '%20')}"}
            validator = self._parts[key] = jsonschema_rs.Draft202012Validator(reference, registry=registry)
        return validator.is_valid(value)

    def target(self, reference: str) -> Schema | bool:
        """The schema that a `#` reference points to (JSON Pointer, RFC 6901, in a URI fragment); any value where it
        is another kind of reference, which only the validator follows."""
        found: Any = self.root
        if reference != "#" and not reference.startswith("#/"):
            return True
        for step in reference.split("/")[1:]:
            name = unquote(step).replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]
        assert isinstance(found, dict | bool)  # the validator compiled it
        return found


def compiled(schema: Schema, param: str) -> CompiledSchema:
    """The schema, validated.

    Raises:
        Refused: 400; `param` and the path inside the schema name the first mistake.
    """
    try:
        return _compiled(msgspec.json.encode(schema))
    except (ValueError, TypeError, RecursionError) as error:
        path = "".join(
            f"[{step}]" if isinstance(step, int) else f".{step}" for step in getattr(error, "instance_path", ())
        )
        where = f"{param}{path}"
        reason = getattr(error, "message", str(error))
        raise Refused(400, f"Invalid schema: {where}: {reason}", code="invalid_schema", param=where) from error


@lru_cache(maxsize=64)  # a job has a few schemas and sends them with every row
def _compiled(text: bytes) -> CompiledSchema:
    return CompiledSchema(msgspec.json.decode(text))


def _fetch_nothing(uri: str) -> Any:
    raise ValueError(f"{uri} is outside of the schema")
