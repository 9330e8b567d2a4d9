"""Durable jobs: submitted, polled, watched, cancelled, retried; recorded, told to webhooks, and answered for."""
