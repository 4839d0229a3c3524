"""Sends one request and receives its response over HTTP: no retry, no rate, no interpretation."""
