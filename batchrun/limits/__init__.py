"""The gate: rates, tokens, budget and requests in flight, and what is learned about the endpoint's limits."""
