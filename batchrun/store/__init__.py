"""What is durable of a run: the database and its thread, the slots, the account, what was fixed at the start."""
