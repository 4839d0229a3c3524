"""Writes the price list into the package whenever a wheel of it is built, editable ones included."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PLACE = Path("batchrun/price_list")


class PriceListHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        place = Path(self.root) / PLACE
        spec = spec_from_file_location("convert", place / "convert.py")
        assert spec is not None
        assert spec.loader is not None
        convert = module_from_spec(spec)
        spec.loader.exec_module(convert)
        convert.write(place / "data")
