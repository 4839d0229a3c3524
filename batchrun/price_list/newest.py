"""Which price list counts: the one that was built into the package, or a newer `genai-prices` that is installed."""

import re
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
    built_in = _built_in()
    if find_spec("genai_prices") is not None:
        return _newer(built_in)
    if built_in is None:
        raise _not_built()
    return built_in


def _built_in() -> PriceList | None:
    try:
        return _LIST.decode(BUILT_IN.read_bytes())
    except (OSError, msgspec.MsgspecError):  # not built, or by another version
        return None


def _newer(built_in: PriceList | None) -> PriceList:
    from importlib.metadata import PackageNotFoundError, version

    from batchrun.price_list import convert

    try:
        installed = version(convert.PACKAGE)
    except PackageNotFoundError:  # a folder of that name
        installed = ""
    if built_in is not None and _order(installed) <= _order(built_in.version):
        return built_in
    try:
        return _LIST.decode(convert.installed())
    except Exception as error:  # a later version may have any other form
        if built_in is None:
            raise _not_built() from error
        source = f"{built_in.source} (the form of {installed}, which is installed, is not known)"
        return msgspec.structs.replace(built_in, source=source)


def _order(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _not_built() -> JobError:
    return JobError(f"{BUILT_IN} is missing or of another version; build it: `pip install -e .` in the source tree")


_LIST = msgspec.json.Decoder(PriceList)
