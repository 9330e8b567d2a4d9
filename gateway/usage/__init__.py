"""The usage ledger: events of finished jobs, their way into the database, and what callers read of them.

A gateway without LEDGER_URL makes no events.
"""
