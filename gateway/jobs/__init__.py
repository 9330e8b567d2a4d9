"""Durable jobs: submission, records, events, the attempt gate, retries and results over HTTP."""
