"""What a start finds and is about to do: the check pass, a changed input, a retry, an estimate."""
