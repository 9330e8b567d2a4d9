"""Batches: the requests of a file, run as durable jobs in the lane flex, with their responses in an output file."""
