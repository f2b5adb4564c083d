"""The schema of release 0.2.0: jobs with their leases, and whether a search goes on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0.2.0"
down_revision = "0.1.0"

_RUNNING = sa.text("state = 'running'")


def upgrade() -> None:
    """Add two tables; nothing that is there changes."""
    op.create_table(
        "job",
        sa.Column("uuid", sa.Text, primary_key=True, nullable=False),
        _study(),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        *(sa.Column(name, sa.Text) for name in ("worker", "host", "boot", "device")),
        sa.Column("expires_ms", sa.Integer().with_variant(sa.BigInteger, "postgresql")),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.Text, nullable=False),
        sa.UniqueConstraint("study", "number"),
        sa.CheckConstraint("state IN ('waiting', 'running', 'done')", name="state"),
        sa.CheckConstraint("json_valid(body)", name="body").ddl_if(dialect="sqlite"),
        sqlite_strict=True,
    )
    op.create_index(
        "ix_job_device",
        "job",
        ["device"],
        unique=True,
        sqlite_where=_RUNNING,
        postgresql_where=_RUNNING,
    )
    op.create_table(
        "search", _study(primary_key=True), sa.Column("ended_at", sa.Text), sqlite_strict=True
    )


def _study(*, primary_key: bool = False) -> sa.Column[str]:
    points = sa.ForeignKey("study.name", ondelete="RESTRICT")
    return sa.Column("study", sa.Text, points, primary_key=primary_key, nullable=False)
