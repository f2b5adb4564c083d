"""The schema of release 0.3.0: tiles of expert layers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0.3.0"
down_revision = "0.2.0"


def upgrade() -> None:
    """Add a table; nothing that is there changes."""
    op.create_table(
        "moe_tuning",
        sa.Column("id", sa.Integer, primary_key=True, nullable=False),
        *(_fact(name) for name in ("hardware", "software")),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("body", "created_at")),
        sa.CheckConstraint("json_valid(body)", name="body").ddl_if(dialect="sqlite"),
        sqlite_autoincrement=True,
        sqlite_strict=True,
    )
    op.create_index("ix_moe_tuning_hardware_key", "moe_tuning", ["hardware_key"])


def _fact(name: str) -> sa.Column[str]:
    points = sa.ForeignKey(f"{name}.key", ondelete="RESTRICT")
    return sa.Column(f"{name}_key", sa.Text, points, nullable=False)
