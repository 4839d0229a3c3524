"""What is asked: the job file and its mistakes, the API's fields, what an answer is expected to be."""
