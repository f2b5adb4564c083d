"""The tables: content-addressed facts that are only ever added to, and one pointer that moves.

hardware, software, workload, policy    facts under their digest
evidence                                what a policy gave, on which of the three
active, active_history                  the evidence in use per hardware, workload and tier
study, trial, profile, artifact         how it was found
job, search                             what is being evaluated, by whom, and until when
moe_tuning                              tiles of expert layers per hardware and shape of layer

Bodies are the JSON of the record of the same name; columns beside a body repeat what is searched.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_STRICT = {"sqlite_strict": True}  # SQLite then refuses a text in an integer column
_COUNTED = {**_STRICT, "sqlite_autoincrement": True}  # ids are never given out twice


def _json_body() -> CheckConstraint:
    return CheckConstraint("json_valid(body)", name="body").ddl_if(dialect="sqlite")


def _reference(target: str) -> Mapped[Any]:
    return mapped_column(Text, ForeignKey(target, ondelete="RESTRICT"))


class Schema(DeclarativeBase):
    """The root of all tables."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )


class HardwareRow(Schema):
    """A `Hardware` under its key."""

    __tablename__ = "hardware"
    __table_args__ = (_json_body(), _STRICT)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[str] = mapped_column(Text)


class SoftwareRow(Schema):
    """A `Software` under its key."""

    __tablename__ = "software"
    __table_args__ = (_json_body(), _STRICT)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[str] = mapped_column(Text)


class WorkloadRow(Schema):
    """A `Workload` under its key."""

    __tablename__ = "workload"
    __table_args__ = (_json_body(), _STRICT)
    key: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[str] = mapped_column(Text)


class PolicyRow(Schema):
    """A `Policy` under its digest; rows are added, never changed."""

    __tablename__ = "policy"
    __table_args__ = (_json_body(), _STRICT)
    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    schema_version: Mapped[int] = mapped_column(Integer)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class EvidenceRow(Schema):
    """An `Evidence`: what a policy gave, and on what."""

    __tablename__ = "evidence"
    __table_args__ = (_json_body(), _COUNTED)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    policy: Mapped[str] = _reference("policy.digest")
    hardware_key: Mapped[str] = _reference("hardware.key")
    software_key: Mapped[str] = _reference("software.key")
    workload_key: Mapped[str] = _reference("workload.key")
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class ActiveRow(Schema):
    """Which evidence, and so which policy, is in use: the only row that is ever changed."""

    __tablename__ = "active"
    __table_args__ = (_STRICT,)
    hardware_key: Mapped[str] = mapped_column(
        Text, ForeignKey("hardware.key", ondelete="RESTRICT"), primary_key=True
    )
    workload_key: Mapped[str] = mapped_column(
        Text, ForeignKey("workload.key", ondelete="RESTRICT"), primary_key=True
    )
    tier: Mapped[str] = mapped_column(Text, primary_key=True, server_default="default")
    evidence_id: Mapped[int] = mapped_column(
        Integer, ForeignKey("evidence.id", ondelete="RESTRICT")
    )


class ActiveHistoryRow(Schema):
    """Every change of `active`, the oldest first."""

    __tablename__ = "active_history"
    __table_args__ = (_COUNTED,)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    hardware_key: Mapped[str] = _reference("hardware.key")
    workload_key: Mapped[str] = _reference("workload.key")
    tier: Mapped[str] = mapped_column(Text)
    evidence_id: Mapped[int] = mapped_column(
        Integer, ForeignKey("evidence.id", ondelete="RESTRICT")
    )
    created_at: Mapped[str] = mapped_column(Text)


class StudyRow(Schema):
    """A `Study` under its name."""

    __tablename__ = "study"
    __table_args__ = (_json_body(), _STRICT)
    name: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class TrialRow(Schema):
    """A `Trial` of a study."""

    __tablename__ = "trial"
    __table_args__ = (UniqueConstraint("study", "number"), _json_body(), _STRICT)
    uuid: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = _reference("study.name")
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(Text)
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class ProfileRow(Schema):
    """A `Profile`; the newest of a hardware and workload counts."""

    __tablename__ = "profile"
    __table_args__ = (_json_body(), _COUNTED)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    hardware_key: Mapped[str] = _reference("hardware.key")
    software_key: Mapped[str] = _reference("software.key")
    workload_key: Mapped[str] = _reference("workload.key")
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class ArtifactRow(Schema):
    """An `Artifact`; its bytes lie in a file."""

    __tablename__ = "artifact"
    __table_args__ = (_STRICT,)
    sha256: Mapped[str] = mapped_column(Text, primary_key=True)
    media_type: Mapped[str] = mapped_column(Text)
    byte_count: Mapped[int] = mapped_column(Integer().with_variant(BigInteger, "postgresql"))
    created_at: Mapped[str] = mapped_column(Text)


class JobRow(Schema):
    """A `Job`, and the lease of whoever evaluates it; `expires_ms` is on the database's clock."""

    __tablename__ = "job"
    __table_args__ = (
        UniqueConstraint("study", "number"),
        CheckConstraint("state IN ('waiting', 'running', 'done')", name="state"),
        _json_body(),
        # two evaluations that share a device would measure each other
        Index(
            "ix_job_device",
            "device",
            unique=True,
            sqlite_where=text("state = 'running'"),
            postgresql_where=text("state = 'running'"),
        ),
        _STRICT,
    )
    uuid: Mapped[str] = mapped_column(Text, primary_key=True)
    study: Mapped[str] = _reference("study.name")
    number: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(Integer)
    worker: Mapped[str | None] = mapped_column(Text)
    host: Mapped[str | None] = mapped_column(Text)
    boot: Mapped[str | None] = mapped_column(Text)
    device: Mapped[str | None] = mapped_column(Text)
    expires_ms: Mapped[int | None] = mapped_column(Integer().with_variant(BigInteger, "postgresql"))
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)


class SearchRow(Schema):
    """Whether a study's search goes on: workers stay until it has ended."""

    __tablename__ = "search"
    __table_args__ = (_STRICT,)
    study: Mapped[str] = mapped_column(
        Text, ForeignKey("study.name", ondelete="RESTRICT"), primary_key=True
    )
    ended_at: Mapped[str | None] = mapped_column(Text)


class MoeTuningRow(Schema):
    """A `TunedLayer`; of those that hold somewhere the newest counts."""

    __tablename__ = "moe_tuning"
    __table_args__ = (Index("ix_moe_tuning_hardware_key", "hardware_key"), _json_body(), _COUNTED)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    hardware_key: Mapped[str] = _reference("hardware.key")
    software_key: Mapped[str] = _reference("software.key")
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[str] = mapped_column(Text)
