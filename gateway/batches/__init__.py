"""Batches: a file of requests, run as durable jobs in the lane flex, and their answers in another file."""
