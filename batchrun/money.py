"""Money is an integer of 10⁻¹² USD inside, exact and fast; a Decimal at the edges: text, JSON, Parquet. PURE.

Names say which it is: `_pico_usd` and `_usd`.
"""

from decimal import ROUND_HALF_EVEN, Decimal

PICO = Decimal("1e-12")  # the scale of decimal128(20, 12)

MAX_USD = 1_000_000
"""No attempt costs this much; a larger figure is an error, or not in US dollars, and no bill should be made of it."""

MAX_PICO_USD = MAX_USD * 10**12


def to_pico(usd: Decimal, rounding: str = ROUND_HALF_EVEN) -> int:
    """The amount as a whole number of 10⁻¹² USD."""
    return int(usd.quantize(PICO, rounding) * 10**12)


def to_usd(pico_usd: int) -> Decimal:
    """The same amount, as a person would write it: `5` and `0.2`, neither `5.000000000000` nor `0E-12`."""
    whole, rest = divmod(pico_usd, 10**12)
    return (pico_usd * PICO).normalize() if rest else Decimal(whole)


def usd_or_none(pico_usd: int | None) -> Decimal | None:
    """As `to_usd`; None (unknown) stays None."""
    return None if pico_usd is None else to_usd(pico_usd)


def in_words(pico_usd: int) -> str:
    """ "$0.20", "$0.194642": all significant digits, at least two decimals."""
    whole, _, part = f"{to_usd(pico_usd):,f}".partition(".")
    return f"${whole}.{part.rstrip('0').ljust(2, '0')}"
