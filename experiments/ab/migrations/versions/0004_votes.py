"""Votes of the arena.

Revision: 0004, after 0003.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "story_votes",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(32), nullable=False, unique=True),
        sa.Column("at", sa.Float(53), nullable=False, index=True),
        sa.Column("user_hash", sa.String(32), nullable=False),
        sa.Column("prompt_digest", sa.String(64), nullable=False),
        sa.Column("prompt", sa.Text, nullable=True),
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("first", sa.Text, nullable=False),
        sa.Column("first_digest", sa.String(64), nullable=False),
        sa.Column("first_settings", sa.Text, nullable=False),
        sa.Column("first_story", sa.String(64), nullable=False),
        sa.Column("first_words", sa.Integer, nullable=False),
        sa.Column("first_read", sa.Float(53), nullable=True),
        sa.Column("second", sa.Text, nullable=False),
        sa.Column("second_digest", sa.String(64), nullable=False),
        sa.Column("second_settings", sa.Text, nullable=False),
        sa.Column("second_story", sa.String(64), nullable=False),
        sa.Column("second_words", sa.Integer, nullable=False),
        sa.Column("second_read", sa.Float(53), nullable=True),
        sa.Column("seconds", sa.Float(53), nullable=False),
        sa.Column("choice", sa.String(20), nullable=False),
        sa.Column("fault", sa.String(40), nullable=False),
    )
