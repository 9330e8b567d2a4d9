"""Servers, gateways and workers in containers, and what only containers can suffer."""
