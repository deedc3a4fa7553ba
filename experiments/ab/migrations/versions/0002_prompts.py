"""Prompts may be kept, where an operator switches that on.

Revision: 0002, after 0001. Rows from before hold none.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("story_exposures", sa.Column("prompt", sa.Text, nullable=True))
