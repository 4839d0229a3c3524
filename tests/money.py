"""Money as the package counts it."""

from decimal import Decimal

from batchrun.money import to_pico


def pico(usd: object) -> int:
    """USD in 10⁻¹² USD."""
    return to_pico(Decimal(str(usd)))
