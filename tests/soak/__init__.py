"""Durable jobs while their parts are killed: the harness of `tests/faults/test_jobs_*` and of `make soak`. See README.md."""
