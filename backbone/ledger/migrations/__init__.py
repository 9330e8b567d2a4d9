"""Alembic's migrations of the ledger. They run when a gateway opens the database."""
