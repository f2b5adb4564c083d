from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from ditune.db import engine as engines
from ditune.db.engine import VERSION_TABLE
from ditune.db.errors import CorruptData, UsageFault
from ditune.db.records import PolicyFile, Profile, Study, Trial
from ditune.db.schema import Base
from ditune.db.store import Store, study_storage_url, upgrade

MakeFile = Callable[..., PolicyFile]


# --- policies --------------------------------------------------------------------------------


def test_a_saved_and_activated_policy_comes_back(store: Store, make_file: MakeFile) -> None:
    saved = make_file()
    assert store.active(saved.hardware, saved.workload) is None
    store.save_and_activate(saved)
    assert saved == store.active(saved.hardware, saved.workload)
    assert [saved] == store.policies()
    assert saved == store.policy(saved.policy_id[:15])
    assert saved == store.policy(saved.policy_id.removeprefix("sha256:")[:8])


def test_only_the_pointer_moves_and_its_history_is_kept(store: Store, make_file: MakeFile) -> None:
    first, second = make_file("step"), make_file("cfg")
    store.save_and_activate(first)
    evidence_id = store.save_policy(second)
    assert first == store.active(first.hardware, first.workload)
    store.activate(evidence_id)
    store.activate(1)
    assert first == store.active(first.hardware, first.workload)
    history = store.activations(first.hardware, first.workload)
    assert [first.policy_id, second.policy_id, first.policy_id] == history
    assert 2 == len(store.policies())


def test_tiers_are_separate_pointers(store: Store, make_file: MakeFile) -> None:
    store.save_and_activate(make_file("step"))
    store.save_and_activate(make_file("cfg"), tier="fast")
    found = store.active(make_file().hardware, make_file().workload, tier="fast")
    assert make_file("cfg") == found
    assert make_file("step") == store.active(make_file().hardware, make_file().workload)


@pytest.mark.parametrize("prefix", ["sha256:ff", "zz", ""])
def test_unknown_or_ambiguous_ids_are_refused(
    store: Store, make_file: MakeFile, prefix: str
) -> None:
    store.save_policy(make_file("step"))
    store.save_policy(make_file("cfg"))
    with pytest.raises(UsageFault, match="tune policy list"):
        store.policy(prefix)
    with pytest.raises(UsageFault, match="no evidence 99"):
        store.activate(99)


# --- studies, trials, profiles, files --------------------------------------------------------


def test_studies_and_trials_are_kept_once(store: Store, study: Study, trial: Trial) -> None:
    store.save_study(study)
    store.save_study(study)
    later = trial.model_copy(update={"uuid": "u1", "number": 1})
    for each in (later, trial, trial):
        store.save_trial(each)
    assert [study] == store.studies()
    assert study == store.study(study.name)
    assert store.study("other") is None
    assert [trial, later] == store.trials(study.name)
    assert [] == store.trials("other")


def test_another_study_under_the_same_name_is_refused(store: Store, study: Study) -> None:
    store.save_study(study)
    changed = study.model_copy(update={"created_at": "2027-01-01T00:00:00Z"})
    with pytest.raises(CorruptData, match="another study"):
        store.save_study(changed)


def test_the_newest_profile_counts(store: Store, profile: Profile) -> None:
    assert store.profile(profile.hardware, profile.workload) is None
    store.save_profile(profile)
    newer = profile.model_copy(update={"total_ms": 3.0})
    store.save_profile(newer)
    assert newer == store.profile(profile.hardware, profile.workload)


def test_files_lie_under_their_content_address(store: Store, database: Path) -> None:
    artifact = store.save_artifact(b"frames", "image/png")
    assert artifact == store.save_artifact(b"frames", "image/png")
    path = store.artifact_path(artifact.sha256)
    assert b"frames" == path.read_bytes()
    assert path.is_relative_to(database.with_suffix(".artifacts"))
    assert 1 == len(list(path.parent.iterdir()))


# --- opening ---------------------------------------------------------------------------------


def test_migrations_and_tables_agree(store: Store, database: Path) -> None:
    engine = engines.create(engines.parse_url(str(database)))
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE}
        context = MigrationContext.configure(connection, opts=options)
        assert [] == compare_metadata(context, Base.metadata)
    engine.dispose()
    with closing(sqlite3.connect(database)) as raw:
        rows = raw.execute("SELECT name, sql FROM sqlite_master WHERE type='table'").fetchall()
    tables = {name: sql for name, sql in rows if name in Base.metadata.tables}
    assert set(Base.metadata.tables) == set(tables)
    assert all("STRICT" in sql for sql in tables.values())
    assert "json_valid(body)" in tables["policy"]


def test_bodies_that_are_no_json_are_refused_by_the_database(store: Store, database: Path) -> None:
    with closing(sqlite3.connect(database)) as raw, pytest.raises(sqlite3.IntegrityError):
        raw.execute("INSERT INTO hardware VALUES ('k', 'not json')")


def test_a_url_and_a_path_open_the_same(database: Path, make_file: MakeFile) -> None:
    with Store.open(f"sqlite:///{database}") as first:
        first.save_policy(make_file())
    with Store.open(str(database)) as second:
        assert 1 == len(second.policies())


@pytest.mark.parametrize(
    "garbage", [b"not a database at all" * 99, b"SQLite format 3\0" + b"x" * 5000]
)
def test_damaged_files_are_refused(database: Path, garbage: bytes) -> None:
    database.write_bytes(garbage)
    with pytest.raises(CorruptData, match="damaged"):
        Store.open(str(database))
    assert garbage == database.read_bytes()


def test_damaged_pages_are_found(database: Path, make_file: MakeFile) -> None:
    with Store.open(str(database)) as store:
        for _ in range(30):
            store.save_policy(make_file())
    data = bytearray(database.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 200] = b"\xff" * 200
    database.write_bytes(data)
    with pytest.raises(CorruptData, match="damaged"):
        Store.open(str(database))


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageFault, match="cannot write the database"):
        Store.open(str(tmp_path / "file" / "policies.db"))
    with pytest.raises(UsageFault, match="is a folder"):
        Store.open(str(tmp_path))
    with pytest.raises(UsageFault, match="cannot read the database URL"):
        Store.open("://")


def test_schemas_of_other_versions_are_refused_with_what_to_do(
    database: Path, make_file: MakeFile
) -> None:
    with Store.open(str(database)) as store:
        store.save_policy(make_file())
    for version, says in (("9.9.9", "upgrade ditune"), (None, "tune db upgrade")):
        with closing(sqlite3.connect(database)) as raw:
            raw.execute(f"DELETE FROM {VERSION_TABLE}")
            if version:
                raw.execute(f"INSERT INTO {VERSION_TABLE} VALUES (?)", (version,))
            raw.commit()
        with pytest.raises(CorruptData, match=says):
            Store.open(str(database))


def test_upgrade_keeps_a_copy(database: Path, make_file: MakeFile) -> None:
    with Store.open(str(database)) as store:
        store.save_policy(make_file())
    copy = upgrade(str(database))
    assert copy is not None
    with Store.open(str(copy)) as store:
        assert 1 == len(store.policies())


def test_backup_is_a_whole_database(store: Store, tmp_path: Path, make_file: MakeFile) -> None:
    store.save_policy(make_file())
    store.backup(tmp_path / "copy.db")
    with Store.open(str(tmp_path / "copy.db")) as copy:
        assert store.policies() == copy.policies()
    with pytest.raises(UsageFault, match="no folder"):
        store.backup(tmp_path / "nowhere" / "copy.db")


def test_optunas_tables_never_stand_among_ours() -> None:
    assert "sqlite:////a/policies.study.db" == study_storage_url("/a/policies.db")
    server = study_storage_url("postgresql+psycopg://u:p@host/db")
    assert server.startswith("postgresql+psycopg://u:p@host/db?options=")


def test_many_writers_never_find_the_database_locked(database: Path, make_file: MakeFile) -> None:
    Store.open(str(database)).close()
    faults: list[BaseException] = []

    def write() -> None:
        try:
            with Store.open(str(database)) as store:
                for _ in range(5):
                    store.save_and_activate(make_file())
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [] == faults
    with Store.open(str(database)) as store:
        assert 40 == len(store.policies())
        assert 40 == len(store.activations(make_file().hardware, make_file().workload))
