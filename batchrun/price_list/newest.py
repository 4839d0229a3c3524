"""Chooses the price list: the one that is built into the package, or a newer `genai-prices` that is installed."""

import re
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import msgspec

from batchrun.errors import JobError
from batchrun.price_list.tables import PriceList

BUILT_IN = Path(__file__).parent / "data" / "prices.json"


@cache
def price_list() -> PriceList:
    """The newer of the two; its `source` says which it is.

    Raises:
        JobError: there is neither; the source tree was not built.
    """
    built_in: PriceList | None = None
    with suppress(OSError, msgspec.MsgspecError):  # not built, or by another version
        built_in = _LIST.decode(BUILT_IN.read_bytes())
    if find_spec("genai_prices") is not None:
        from importlib.metadata import PackageNotFoundError, version

        from batchrun.price_list import convert

        try:
            installed = version(convert.PACKAGE)
        except PackageNotFoundError:  # a folder of that name
            installed = ""
        if built_in is None or _order(installed) > _order(built_in.version):
            try:
                return _LIST.decode(convert.installed())
            except Exception as error:  # a later version may have any other form
                if built_in is None:
                    raise JobError(_NOT_BUILT) from error
                source = f"{built_in.source} (the form of {installed}, which is installed, is not known)"
                return msgspec.structs.replace(built_in, source=source)
    if built_in is None:
        raise JobError(_NOT_BUILT)
    return built_in


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


_NOT_BUILT = f"{BUILT_IN} is missing or of another version; build it: `pip install -e .` in the source tree"
_LIST = msgspec.json.Decoder(PriceList)
