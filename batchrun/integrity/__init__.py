"""Damaged runs: `verify` finds the damage, `salvage` copies everything intact."""
