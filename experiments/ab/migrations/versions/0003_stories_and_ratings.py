"""Stories, how they ended, and how users rated them.

Revision: 0003, on an empty database; 0001 and 0002 are part of it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = None


def upgrade() -> None:
    """Make the three tables."""
    number = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "story_exposures",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("story", sa.String(64), nullable=False, unique=True),
        sa.Column("at", sa.Float(53), nullable=False, index=True),
        sa.Column("test", sa.String(200), nullable=False, index=True),
        sa.Column("split", sa.Text, nullable=False),
        sa.Column("variant", sa.String(200), nullable=False),
        sa.Column("user_hash", sa.String(32), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("version", sa.String(40), nullable=False),
        sa.Column("prompt", sa.Text, nullable=True),
    )
    op.create_table(
        "story_endings",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(32), nullable=False, unique=True),
        sa.Column("story", sa.String(64), nullable=False, index=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("outcome", sa.String(20), nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("ttft", sa.Float(53), nullable=True),
        sa.Column("duration", sa.Float(53), nullable=False),
        sa.Column("rate", sa.Float(53), nullable=True),
        sa.Column("served_by", sa.String(40), nullable=False),
    )
    op.create_table(
        "story_ratings",
        sa.Column("id", number, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(32), nullable=False, unique=True),
        sa.Column("story", sa.String(64), nullable=False, index=True),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("rating", sa.SmallInteger, nullable=False),
    )
