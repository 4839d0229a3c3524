"""The commands of the command line, one module each (`check` and `estimate`, `status` and `watch` share one).

A flag is a `click.option` here, and a field of what the command calls.
"""
