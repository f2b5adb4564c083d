"""The schema of release 0.1.0: all tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0.1.0"
down_revision = None

_FACTS = ("hardware", "software", "workload")


def upgrade() -> None:
    """Create every table, each after those that it points to."""
    _policies()
    _searches()


def _policies() -> None:
    for name in _FACTS:
        _table(name, _text("key", primary_key=True), body=True)
    _table(
        "policy",
        _text("digest", primary_key=True),
        sa.Column("schema_version", sa.Integer, nullable=False),
        body=True,
        created=True,
    )
    _table(
        "evidence",
        _id(),
        _reference("policy", "policy.digest"),
        *_keys(*_FACTS),
        body=True,
        created=True,
    )
    _table(
        "active",
        *_keys("hardware", "workload", primary_key=True),
        _text("tier", primary_key=True, default="default"),
        _evidence_id(),
    )
    _table(
        "active_history",
        _id(),
        *_keys("hardware", "workload"),
        _text("tier"),
        _evidence_id(),
        created=True,
    )


def _searches() -> None:
    _table("study", _text("name", primary_key=True), body=True, created=True)
    _table(
        "trial",
        _text("uuid", primary_key=True),
        _reference("study", "study.name"),
        sa.Column("number", sa.Integer, nullable=False),
        _text("state"),
        sa.UniqueConstraint("study", "number"),
        body=True,
        created=True,
    )
    _table("profile", _id(), *_keys(*_FACTS), body=True, created=True)
    _table(
        "artifact",
        _text("sha256", primary_key=True),
        _text("media_type"),
        sa.Column(
            "byte_count", sa.Integer().with_variant(sa.BigInteger, "postgresql"), nullable=False
        ),
        created=True,
    )


def _table(
    name: str, *parts: sa.schema.SchemaItem, body: bool = False, created: bool = False
) -> None:
    """Create one table as 0.1.0 has it: strict on SQLite, its body checked to be JSON."""
    items = list(parts)
    if body:
        valid = sa.CheckConstraint("json_valid(body)", name="body").ddl_if(dialect="sqlite")
        items += [_text("body"), valid]
    if created:
        items.append(_text("created_at"))
    counted = any(isinstance(part, sa.Column) and part.name == "id" for part in parts)
    options = {"sqlite_autoincrement": True} if counted else {}
    op.create_table(name, *items, sqlite_strict=True, **options)


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.Integer, primary_key=True)


def _text(name: str, *, primary_key: bool = False, default: str | None = None) -> sa.Column[str]:
    return sa.Column(name, sa.Text, primary_key=primary_key, nullable=False, server_default=default)


def _reference(name: str, target: str, *, primary_key: bool = False) -> sa.Column[str]:
    points = sa.ForeignKey(target, ondelete="RESTRICT")
    return sa.Column(name, sa.Text, points, primary_key=primary_key, nullable=False)


def _evidence_id() -> sa.Column[int]:
    points = sa.ForeignKey("evidence.id", ondelete="RESTRICT")
    return sa.Column("evidence_id", sa.Integer, points, nullable=False)


def _keys(*facts: str, primary_key: bool = False) -> list[sa.Column[str]]:
    return [_reference(f"{fact}_key", f"{fact}.key", primary_key=primary_key) for fact in facts]
