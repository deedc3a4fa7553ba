"""The three tables of the store, as SQLAlchemy knows them. How a database comes to have them: `migrations/`.

`id` counts within a table and is the order in which events arrived; `at` is a clock's word, and clocks differ.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)

HEAD = "0002"
"""The newest migration, so that a program that starts need not load Alembic to see that nothing is to be done."""
VERSION_TABLE = "story_alembic_version"
"""Of our own: MLflow keeps an `alembic_version`, and may share the database."""

metadata = MetaData()
_Id = BigInteger().with_variant(Integer, "sqlite")

exposures = Table(
    "story_exposures",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("story", String(64), nullable=False, unique=True),
    Column("at", Float(53), nullable=False, index=True),
    Column("test", String(200), nullable=False, index=True),
    Column("split", Text, nullable=False),
    Column("arm", String(200), nullable=False),
    Column("visitor", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("version", String(40), nullable=False),
    Column("prompt", Text, nullable=True),
)

endings = Table(
    "story_endings",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("key", String(32), nullable=False, unique=True),
    Column("story", String(64), nullable=False, index=True),
    Column("at", Float(53), nullable=False),
    Column("outcome", String(20), nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("ttft", Float(53), nullable=True),
    Column("duration", Float(53), nullable=False),
    Column("rate", Float(53), nullable=True),
    Column("writer", String(40), nullable=False),
)

ratings = Table(
    "story_ratings",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=True),
    Column("key", String(32), nullable=False, unique=True),
    Column("story", String(64), nullable=False, index=True),
    Column("at", Float(53), nullable=False),
    Column("rating", SmallInteger, nullable=False),
)
