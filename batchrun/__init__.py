"""batchrun: a file of prompts in, a Parquet file of completions and their cost out."""

__version__ = "0.1.0"
