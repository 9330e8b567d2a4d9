"""Limits of keys and teams: what they allow, how fast, and how much at the same time."""
