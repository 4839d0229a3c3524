"""Joins the shards of one input into one run: `shards` checks that they fit, `merged_manifest` counts their rows and
starts through, `merged` writes the run.
"""
