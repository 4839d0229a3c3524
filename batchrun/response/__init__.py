"""The bytes of an answer: while they arrive, as they are stored, and what they say."""
