"""Serve repeated seeded requests from a cache and coalesce identical concurrent ones."""
