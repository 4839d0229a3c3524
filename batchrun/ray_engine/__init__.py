"""Sends requests from the actors of a Ray cluster, docs/ray.md. Only `cluster`, `fleet` and `failures` import ray."""
