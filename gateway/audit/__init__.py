"""The audit log: who did what to what, from where, with which result.

Administrative routes have `AuditedRoute` as their class; other parts call `AuditLog.record`. A gateway without LEDGER_URL records
nothing.
"""
