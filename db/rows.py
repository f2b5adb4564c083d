"""Writing rows: what the tables of policies, searches and profiles share."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from ditune.db.parsing import address_of
from ditune.db.record import Record
from ditune.db.records import Hardware, PolicyFile, Profile, Software, Trial, Workload
from ditune.db.schema import HardwareRow, Schema, SoftwareRow, TrialRow, WorkloadRow


def insert_new(session: Session, table: type[Schema], row: dict[str, Any]) -> None:
    """Insert a row unless its primary key is taken, by this process or by another."""
    on_server = session.get_bind().dialect.name == "postgresql"
    insert = postgresql.insert(table) if on_server else sqlite.insert(table)
    key = [column.name for column in table.__table__.primary_key]
    session.execute(insert.values(row).on_conflict_do_nothing(index_elements=key))


def save_facts(session: Session, record: PolicyFile | Profile) -> dict[str, str]:
    """Keep a record's hardware, software and workload; return the columns that point to them.

    Raises:
        CorruptData: A number in them has no canonical form.
    """
    keys = {}
    for name, table, fact in (
        ("hardware", HardwareRow, record.hardware),
        ("software", SoftwareRow, record.software),
        ("workload", WorkloadRow, record.workload),
    ):
        keys[f"{name}_key"] = keep_fact(session, table, fact)
    return keys


def keep_fact(
    session: Session,
    table: type[HardwareRow | SoftwareRow | WorkloadRow],
    fact: Hardware | Software | Workload,
) -> str:
    """Keep a fact under its key and return the key.

    Raises:
        CorruptData: A number in it has no canonical form.
    """
    key = address_of(fact, f"the {table.__tablename__}")
    insert_new(session, table, {"key": key, "body": body(fact)})
    return key


def keep_trial(session: Session, trial: Trial) -> None:
    """Keep a trial; told twice, the first report stays."""
    row = {
        "uuid": trial.uuid,
        "study": trial.study,
        "number": trial.number,
        "state": trial.state,
        "body": body(trial),
        "created_at": trial.created_at,
    }
    insert_new(session, TrialRow, row)


def body(record: Record) -> str:
    """Return a record as the JSON that is stored; unlike the digest's, it has the None fields."""
    return record.model_dump_json()
