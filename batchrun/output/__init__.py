"""Settled rows become Parquet: the life of a chunk, parts, the final file."""
