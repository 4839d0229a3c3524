"""Arrow schemas and Parquet files: the columns of a result, typed JSON, parts, the final files, the usage table."""
