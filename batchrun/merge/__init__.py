"""Joins the shards of one input into one run: `shards` checks that they fit, `merged` writes it."""
