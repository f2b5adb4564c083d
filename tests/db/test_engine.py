from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest

from ditune.db.engine import make_engine, parse_url, shown, study_storage_url
from ditune.db.errors import StoreFault, UsageFault
from ditune.db.store import Store

ReadOnly = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/policies.db", "sqlite:////a/policies.study.db"),
        ("policies.db", "sqlite:///policies.study.db"),
        ("sqlite:///b/my.policies.db", "sqlite:///b/my.policies.study.db"),
        ("plain", "sqlite:///plain.study.db"),
        (
            "postgresql+psycopg://u:p@host/db",
            "postgresql+psycopg://u:p@host/db?options=-csearch_path%3Dditune_study+-csynchronous_commit%3Doff",
        ),
    ],
)
def test_optunas_tables_never_stand_among_ours(given: str, expected: str) -> None:
    assert expected == study_storage_url(given)


def test_options_of_a_server_are_kept() -> None:
    url = parse_url(
        study_storage_url("postgresql://host/db?options=-cwork_mem=64MB&sslmode=require")
    )
    assert (
        url.query["options"]
        == "-cwork_mem=64MB -csearch_path=ditune_study -csynchronous_commit=off"
    )
    assert url.query["sslmode"] == "require"


@pytest.mark.parametrize(
    "nonsense",
    [
        "",
        "://",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x.db?mode=ro&uri=true",
        "sqlite+aiosqlite:///x.db",
        "mysql://host/db",
        "a\0b.db",
    ],
)
def test_what_names_no_database_of_ours_is_refused(nonsense: str) -> None:
    with pytest.raises(UsageFault, match=r"sqlite:///FILE"):
        parse_url(nonsense)


def test_messages_never_show_a_password() -> None:
    url = "postgresql+psycopg://user:secret@127.0.0.1:1/db?connect_timeout=2"
    assert "secret" not in shown(parse_url(url))
    with pytest.raises(UsageFault, match="check the address") as caught:
        Store.open(url)
    assert "secret" not in str(caught.value)


def test_sqlite_is_set_up_for_many_writers(database: Path) -> None:
    engine = make_engine(parse_url(str(database)))
    with engine.connect() as connection:
        values = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
        with (
            closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as other,
            pytest.raises(sqlite3.OperationalError, match="locked"),
        ):
            other.execute("BEGIN IMMEDIATE")
    engine.dispose()
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}
    assert expected == values


def test_paths_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for path, says in (
        (tmp_path / "file" / "policies.db", "does not exist"),
        (tmp_path / "no" / "policies.db", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UsageFault, match=says):
            Store.open(str(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_read_only_places_are_named(open_folder: Path, read_only: ReadOnly) -> None:
    database = open_folder / "policies.db"
    with read_only(open_folder), pytest.raises(UsageFault, match=r"the folder .* is read-only"):
        Store.open(str(database))
    Store.open(str(database)).close()
    with read_only(open_folder), pytest.raises(UsageFault, match="is read-only for this user"):
        Store.open(str(database))
    with (
        Store.open(str(database)) as store,
        read_only(open_folder),
        pytest.raises(UsageFault, match="cannot be made"),
    ):
        store.save_artifact(b"frames", "image/png")


def test_opening_waits_for_the_first_to_open_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = tmp_path / "policies.db"
    with closing(sqlite3.connect(database)) as first:
        first.execute("BEGIN IMMEDIATE")
        waits = []

        def finish(seconds: float) -> None:
            waits.append(seconds)
            first.rollback()

        monkeypatch.setattr("ditune.db.engine.time.sleep", finish)
        Store.open(str(database)).close()
    assert len(waits) == 1


def test_a_file_that_stays_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "policies.db"
    monkeypatch.setattr("ditune.db.engine.BUSY_TIMEOUT_MS", 0)
    with closing(sqlite3.connect(database)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreFault, match="stayed locked by another process"):
            Store.open(str(database))
