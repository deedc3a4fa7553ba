"""Rename columns and one outcome to standard terms: variant, user_hash, served_by, aborted.

Revision: 0003, after 0002.
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"

RENAMED = (
    ("story_exposures", "arm", "variant"),
    ("story_exposures", "visitor", "user_hash"),
    ("story_endings", "writer", "served_by"),
)


def upgrade() -> None:
    """Rename."""
    for table, old, new in RENAMED:
        op.alter_column(table, old, new_column_name=new)
    op.execute("UPDATE story_endings SET outcome = 'aborted' WHERE outcome = 'cut'")
