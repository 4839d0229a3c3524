"""What vendors say their models cost: a list that is built into the package, or a newer one that is installed."""
