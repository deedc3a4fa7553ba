"""Alembic migrations of the event store, in order; a released one is never changed."""
