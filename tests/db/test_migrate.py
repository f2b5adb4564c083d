from __future__ import annotations

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from ditune.db import migrate, readonly
from ditune.db.errors import CorruptData, UsageFault
from ditune.db.records import PolicyFile, Study
from ditune.db.schema import Schema
from ditune.db.store import Store

MakeFile = Callable[..., PolicyFile]
VERSION_TABLE = readonly.VERSION_TABLE
NEXT = '''
"""A release that adds a column, as tests imagine it."""

import sqlalchemy as sa
from alembic import op

revision = "9.0.0"
down_revision = "0.3.0"


def upgrade():
    with op.batch_alter_table("policy", recreate="always") as batch:
        batch.add_column(sa.Column("note", sa.Text))
'''


def tables_of(database: Path) -> dict[str, str]:
    with closing(sqlite3.connect(database)) as raw:
        rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
    return {
        name: re.sub(r"\s+", " ", sql).strip()
        for name, sql in rows
        if not name.startswith("sqlite_")
    }


@pytest.fixture
def filled(database: Path, make_file: MakeFile) -> Path:
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file())
    return database


@pytest.fixture
def next_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this code is a later release, with one migration more."""
    scripts = tmp_path / "a%20folder" / "migrations"
    shutil.copytree(migrate.SCRIPTS, scripts)
    (scripts / "versions" / "r9_0_0.py").write_text(NEXT)
    monkeypatch.setattr(migrate, "SCRIPTS", scripts)


# --- the schema ------------------------------------------------------------------------------


def test_migrations_and_tables_agree(filled: Path, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{filled}", poolclass=NullPool)
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Schema.metadata) == []
    # the comparison does not see checks, STRICT and ON DELETE: compare the statements as well
    Schema.metadata.create_all(create_engine(f"sqlite:///{tmp_path}/x.db", poolclass=NullPool))
    migrated = tables_of(filled)
    assert migrated.pop(VERSION_TABLE)
    assert tables_of(tmp_path / "x.db") == migrated
    assert all(sql.endswith("STRICT") for sql in migrated.values())
    assert "json_valid(body)" in migrated["policy"]


def test_the_light_reader_reads_this_schema() -> None:
    assert migrate.newest() == readonly.REVISIONS[-1]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO hardware VALUES ('k', 'not json')",
        "INSERT INTO policy VALUES ('d', 'not a number', '{}', 't')",
        "UPDATE active SET evidence_id = 99",
        "DELETE FROM policy",
        "DELETE FROM evidence",
    ],
)
def test_the_database_itself_refuses_what_makes_no_sense(filled: Path, statement: str) -> None:
    with closing(sqlite3.connect(filled)) as raw, pytest.raises(sqlite3.IntegrityError):
        raw.execute("PRAGMA foreign_keys=ON")
        raw.execute(statement)


# --- opening ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [b"not a database at all" * 99, b"SQLite format 3\0" + b"x" * 5000, b"SQLite format 3\0"],
)
def test_files_that_are_no_database_are_refused_and_kept(database: Path, garbage: bytes) -> None:
    database.write_bytes(garbage)
    for attempt in (Store.open, migrate.upgrade):
        with pytest.raises(CorruptData, match="damaged"):
            attempt(str(database))
    assert garbage == database.read_bytes()


def test_damaged_pages_are_found(filled: Path) -> None:
    data = bytearray(filled.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    filled.write_bytes(data)
    with pytest.raises(CorruptData, match="damaged"):
        Store.open(str(filled))


@pytest.mark.parametrize(
    ("statement", "error", "says"),
    [
        (f"UPDATE {VERSION_TABLE} SET version_num = '99.0.0'", CorruptData, "upgrade ditune"),
        (f"INSERT INTO {VERSION_TABLE} VALUES ('99.0.0')", CorruptData, "upgrade ditune"),
        (f"DROP TABLE {VERSION_TABLE}", CorruptData, "no version of them"),
        ("CREATE TRIGGER t AFTER INSERT ON policy BEGIN SELECT 1; END", CorruptData, "it has t,"),
    ],
)
def test_other_schemas_are_refused_with_what_to_do(
    filled: Path, statement: str, error: type[Exception], says: str
) -> None:
    with closing(sqlite3.connect(filled)) as raw:
        raw.execute(statement)
        raw.commit()
    for attempt in (Store.open, migrate.upgrade):
        with pytest.raises(error, match=says):
            attempt(str(filled))


def test_another_programs_database_is_left_alone(database: Path) -> None:
    with closing(sqlite3.connect(database)) as raw:
        raw.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(UsageFault, match=r"another program \(it has recipes"):
        Store.open(str(database))
    assert list(tables_of(database)) == ["recipes"]


@pytest.fixture
def of_0_1_0(filled: Path) -> Path:
    """Return a database as release 0.1.0 left it: without the two tables that came after."""
    with closing(sqlite3.connect(filled)) as raw:
        raw.executescript(
            "DROP TABLE job; DROP TABLE search; DROP TABLE moe_tuning; "
            f"UPDATE {VERSION_TABLE} SET version_num = '0.1.0'"
        )
    return filled


def test_a_database_of_0_1_0_is_read_at_once_and_written_after_an_upgrade(
    of_0_1_0: Path, make_file: MakeFile, study: Study
) -> None:
    wanted = make_file()
    found = readonly.find(of_0_1_0, wanted.hardware, wanted.software, wanted.workload)
    assert found.policy_id == wanted.policy_id
    with pytest.raises(CorruptData, match=r"ditune 0\.1\.0, this release needs 0\.3\.0"):
        Store.open(str(of_0_1_0))
    assert migrate.upgrade(str(of_0_1_0)) is not None
    with Store.open(str(of_0_1_0)) as store:
        assert [wanted] == store.policies()
        store.save_study(study)
        store.jobs.begin(study.name)
        assert store.jobs.counts(study.name) == (0, 0)


def test_a_server_gets_the_same_tables(server_database: str) -> None:
    Store.open(server_database).close()
    engine = create_engine(server_database, poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, Schema.metadata) == []


# --- upgrade and copies ----------------------------------------------------------------------


def test_an_older_database_is_upgraded_on_request(
    filled: Path, next_release: None, make_file: MakeFile
) -> None:
    with pytest.raises(CorruptData, match="tune db upgrade"):
        Store.open(str(filled))
    assert "note" not in tables_of(filled)["policy"]
    kept = migrate.upgrade(str(filled))
    assert kept is not None
    assert filled.parent == kept.parent
    assert "note" in tables_of(filled)["policy"]
    assert "note" not in tables_of(kept)["policy"]
    assert migrate.upgrade(str(filled)) is None
    with Store.open(str(filled)) as store:
        assert [make_file()] == store.policies()


def test_a_migration_that_fails_changes_nothing(filled: Path, next_release: None) -> None:
    broken = migrate.SCRIPTS / "versions" / "r9_0_0.py"
    broken.write_text(NEXT + '    op.execute("SELECT * FROM absent")\n')
    before = tables_of(filled)
    with pytest.raises(CorruptData, match="no such table: absent"):
        migrate.upgrade(str(filled))
    assert before == tables_of(filled)


def test_upgrade_makes_a_new_database_and_leaves_a_current_one(database: Path) -> None:
    for _ in range(2):
        assert migrate.upgrade(str(database)) is None
    Store.open(str(database)).close()


def test_a_backup_is_one_whole_file(database: Path, tmp_path: Path, make_file: MakeFile) -> None:
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "copy.db"
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file())
        store.backup(copy)
        with pytest.raises(UsageFault, match="exists already"):
            store.backup(copy)
        with pytest.raises(UsageFault, match="does not exist"):
            store.backup(tmp_path / "nowhere" / "copy.db")
    assert [copy] == list(copy.parent.iterdir())
    found = readonly.find(copy, make_file().hardware, make_file().software, make_file().workload)
    assert found.kind == "exact"
    assert [copy] == list(copy.parent.iterdir())
    with Store.open(str(copy)) as other:
        assert [make_file()] == other.policies()
