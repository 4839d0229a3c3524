"""The one line in which every attempt waits for pace, tokens, money and a slot; what it knows of the limits."""
