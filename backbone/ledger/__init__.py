"""The ledger: a SQL database of what finished jobs used. SQLAlchemy is imported when the database is first opened."""
