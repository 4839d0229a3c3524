"""Vendors' prices for their models: the list that is built into the package, or a newer one that is installed."""
