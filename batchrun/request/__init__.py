"""A row and the job become a request: its body and its key; images are put in when it is sent."""
