"""One request → one response over HTTP, and nothing else: no retry, no pace, no meaning."""
