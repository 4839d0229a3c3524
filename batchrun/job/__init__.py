"""The job file: its settings, its validation and error messages, the API's fields and the expected answer."""
