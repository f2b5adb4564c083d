"""What a store keeps and gives back, on SQLite and, where one is offered, on PostgreSQL.

For PostgreSQL set DITUNE_TEST_POSTGRES to the URL of an empty database; its tables are dropped.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.pool import Pool
from tests.db.conftest import file_of

from ditune.db import engine as engines
from ditune.db.errors import CorruptData, DituneError, StoreFault, UsageFault
from ditune.db.records import Impacts, PolicyFile, Profile, Study, Trial
from ditune.db.store import Store

MakeFile = Callable[..., PolicyFile]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(any_database: str, tmp_path: Path) -> Iterator[Store]:
    with Store.open(any_database, artifacts=tmp_path / "files") as opened:
        yield opened


# --- policies --------------------------------------------------------------------------------


def test_a_saved_and_activated_policy_comes_back(store: Store, make_file: MakeFile) -> None:
    saved = make_file()
    assert store.active(saved.hardware, saved.workload) is None
    store.save_and_activate(saved)
    assert saved == store.active(saved.hardware, saved.workload)
    assert [saved] == store.policies()
    assert saved == store.policy(saved.policy_id[:15])
    assert saved == store.policy(saved.policy_id.removeprefix("sha256:")[:8].upper())


def test_the_same_proof_is_kept_once_and_another_beside_it(
    store: Store, make_file: MakeFile
) -> None:
    first = make_file()
    again = make_file(evidence=first.evidence.model_copy(update={"tuned_ms": 2000.0}))
    assert store.save_policy(first) == store.save_policy(first)
    assert store.save_policy(first) != store.save_policy(again)
    assert [again, first] == store.policies()
    assert again == store.policy(first.policy_id)


def test_only_the_pointer_moves_and_its_history_is_kept(store: Store, make_file: MakeFile) -> None:
    first, second = make_file("step"), make_file("cfg")
    old = store.save_and_activate(first)
    new = store.save_policy(second)
    assert first == store.active(first.hardware, first.workload)
    for evidence_id in (new, new, old):
        store.activate(evidence_id)
    assert first == store.active(first.hardware, first.workload)
    history = store.activations(first.hardware, first.workload)
    assert [first.policy_id, second.policy_id, first.policy_id] == history
    assert [second, first] == store.policies()


def test_tiers_are_separate_pointers(store: Store, make_file: MakeFile) -> None:
    store.save_and_activate(make_file("step"))
    store.save_and_activate(make_file("cfg"), ["fast"])
    hardware, workload = make_file().hardware, make_file().workload
    assert make_file("cfg") == store.active(hardware, workload, tier="fast")
    assert make_file("step") == store.active(hardware, workload)
    assert store.activations(hardware, workload, tier="slow") == []


def test_a_policy_may_serve_several_tiers(store: Store, make_file: MakeFile) -> None:
    first, second = make_file("step"), make_file("cfg")
    store.save_and_activate(first, ["high", "default"])
    store.save_and_activate(second, ["fast"])
    assert store.tiers_in_use(first) == ["default", "high"]
    assert store.tiers_in_use(second) == ["fast"]
    store.save_and_activate(second)
    assert store.tiers_in_use(first) == ["high"]
    assert store.tiers_in_use(second) == ["default", "fast"]
    evidence = second.evidence.model_copy(update={"tuned_ms": 7.0})
    again = second.model_copy(update={"evidence": evidence})
    store.save_and_activate(again, ["fast"])
    assert store.tiers_in_use(second) == ["default"]
    assert store.tiers_in_use(again) == ["fast"]
    assert store.tiers_in_use(make_file("block")) == []


def test_policies_of_a_class_of_models_are_found_whatever_else_differs(
    store: Store, make_file: MakeFile
) -> None:
    first = make_file("step")
    changes = {"steps": 50, "height": 64, "model_digest": "sha256:" + "f" * 64}
    second = make_file("cfg", workload=first.workload.model_copy(update=changes))
    other = first.workload.model_copy(update={"transformer_class": "OtherTransformer"})
    for each in (first, second, make_file("block", workload=other)):
        store.save_policy(each)
    assert [second, first] == store.policies_of("WanTransformer3DModel")
    assert [make_file("block", workload=other)] == store.policies_of("OtherTransformer")
    assert store.policies_of("none of them") == []


def test_ids_that_name_no_single_policy_are_refused(store: Store, make_file: MakeFile) -> None:
    names = ("step", "cfg", "block", "full")
    saved = [make_file(last) for last in names]
    saved += [
        file_of(policy)
        for n in range(20)
        for policy in [
            saved[0].policy.model_copy(
                update={"cache": saved[0].policy.cache.model_copy(update={"fn_blocks": n + 2})}  # type: ignore[union-attr]
            )
        ]
    ]
    for each in saved:
        store.save_policy(each)
    firsts = [each.policy_id[7] for each in saved]
    shared = next(digit for digit in firsts if firsts.count(digit) > 1)
    with pytest.raises(UsageFault, match="give more digits"):
        store.policy(shared)
    with pytest.raises(UsageFault, match="tune policy list"):
        store.policy("sha256:" + "0" * 64)
    for nonsense in ("", "sha256:", "%", "xyz", "0" * 65):
        with pytest.raises(UsageFault, match="is no policy id"):
            store.policy(nonsense)


def test_a_policy_under_a_false_id_changes_nothing(store: Store, make_file: MakeFile) -> None:
    false = make_file(policy_id=make_file("cfg").policy_id)
    with pytest.raises(CorruptData, match="does not match"):
        store.save_and_activate(false)
    with pytest.raises(UsageFault, match="no evidence 99"):
        store.activate(99)
    assert store.policies() == []


# --- studies, trials, profiles, files --------------------------------------------------------


def test_studies_and_trials_are_kept_once(store: Store, study: Study, trial: Trial) -> None:
    for _ in range(2):
        store.save_study(study)
    later = trial.model_copy(update={"uuid": "u1", "number": 1})
    retold = trial.model_copy(update={"speedup": 9.0})
    for each in (later, trial, trial, retold):
        store.save_trial(each)
    assert [study] == store.studies()
    assert study == store.study(study.name)
    assert store.study("other") is None
    assert [trial, later] == store.trials(study.name)
    assert store.trials("other") == []


def test_workers_that_start_one_study_share_the_first(store: Store, study: Study) -> None:
    store.save_study(study)
    store.save_study(study.model_copy(update={"created_at": "2027-01-01T00:00:00Z"}))
    assert [study] == store.studies()
    asked = {"arguments": {"tiers": "high,fast"}, "tier": "high"}
    store.save_study(study.model_copy(update={"created_at": "2027-01-01T00:00:00Z", **asked}))
    study = study.model_copy(update=asked)
    assert [study] == store.studies()  # it is resumed as it was last asked for
    settings = study.settings.model_copy(update={"seed": 1})
    with pytest.raises(CorruptData, match="another search"):
        store.save_study(study.model_copy(update={"settings": settings}))
    assert [study] == store.studies()


def test_trials_need_a_study_and_a_number_of_their_own(
    store: Store, study: Study, trial: Trial
) -> None:
    with pytest.raises(UsageFault, match="holds no study"):
        store.save_trial(trial)
    store.save_study(study)
    store.save_trial(trial)
    with pytest.raises(StoreFault, match="refused a row"):
        store.save_trial(trial.model_copy(update={"uuid": "other"}))
    assert [trial] == store.trials(study.name)


def test_the_newest_profile_counts(store: Store, profile: Profile) -> None:
    assert store.profile(profile.hardware, profile.workload) is None
    store.save_profile(profile)
    newer = profile.model_copy(update={"total_ms": 3.0})
    store.save_profile(newer)
    assert newer == store.profile(profile.hardware, profile.workload)


def test_impacts_serve_every_hardware(store: Store, profile: Profile) -> None:
    assert store.impacts(profile.workload) is None
    found = Impacts(step=1.0, cfg=0.5, block=0.1)
    store.save_profile(profile.model_copy(update={"impacts": found}))
    store.save_profile(profile)  # a later one that measured none
    assert store.impacts(profile.workload) == found
    other = profile.workload.model_copy(update={"steps": 1 + profile.workload.steps})
    assert store.impacts(other) is None


def test_files_lie_under_their_content_address(store: Store, tmp_path: Path) -> None:
    artifact = store.save_artifact(b"frames", "image/png")
    assert artifact == store.save_artifact(b"frames", "text/plain")
    path = store.artifact_path(artifact.sha256)
    assert path.read_bytes() == b"frames"
    digits = artifact.sha256.removeprefix("sha256:")
    assert tmp_path / "files" / digits[:2] / digits[2:] == path
    assert [path] == list(path.parent.iterdir())
    path.write_bytes(b"frame")
    with pytest.raises(CorruptData, match="missing or damaged"):
        store.artifact_path(artifact.sha256)
    store.save_artifact(b"frames", "image/png")
    assert store.artifact_path(artifact.sha256).read_bytes() == b"frames"
    with pytest.raises(UsageFault, match="no artifact"):
        store.artifact_path("sha256:" + "0" * 64)


def test_files_lie_beside_a_sqlite_database(database: Path) -> None:
    with Store.open(str(database)) as opened:
        artifact = opened.save_artifact(b"", "text/plain")
        path = opened.artifact_path(artifact.sha256)
    assert path.is_relative_to(database.with_name("policies.artifacts"))


def test_reopening_finds_everything(
    database: Path, make_file: MakeFile, study: Study, trial: Trial
) -> None:
    with Store.open(str(database)) as first:
        first.save_and_activate(make_file())
        first.save_study(study)
        first.save_trial(trial)
    with Store.open(f"sqlite:///{database}") as second:
        assert [make_file()] == second.policies()
        assert [trial] == second.trials(study.name)


# --- several at once -------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from ditune.db import policy_file
from ditune.db.store import Store
saved = policy_file.read(Path(sys.argv[2]))
for number in range(5):
    update = {"tuned_ms": float(sys.argv[3]) * 100 + number + 1}
    evidence = saved.evidence.model_copy(update=update)
    with Store.open(sys.argv[1]) as store:
        store.save_and_activate(saved.model_copy(update={"evidence": evidence}))
"""


def test_eight_processes_share_a_new_database(
    database: Path, make_file: MakeFile, tmp_path: Path
) -> None:
    saved = tmp_path / "policy.json"
    saved.write_text(make_file().model_dump_json())
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, database, saved, str(number)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    said = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8, said
    with Store.open(str(database)) as store:
        assert len({found.evidence.tuned_ms for found in store.policies()}) == 40
        assert len(store.activations(make_file().hardware, make_file().workload)) == 40


def test_threads_share_one_store(
    store: Store, make_file: MakeFile, study: Study, trial: Trial
) -> None:
    store.save_study(study)
    failed: list[DituneError] = []

    def work(worker: int) -> None:
        try:
            for n in range(5):
                number = worker * 5 + n
                update = {"uuid": f"u{number}", "number": number}
                store.save_trial(trial.model_copy(update=update))
                store.save_and_activate(make_file(("step", "cfg")[worker % 2]))
        except DituneError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert list(range(40)) == [each.number for each in store.trials(study.name)]
    assert len(store.policies()) == 2


def test_readers_never_wait_for_a_writer(
    database: Path, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "BUSY_TIMEOUT_MS", 50)
    with (
        Store.open(str(database)) as store,
        closing(sqlite3.connect(database, isolation_level=None)) as other,
    ):
        store.save_policy(make_file())
        other.execute("BEGIN IMMEDIATE")
        assert len(store.policies()) == 1
        with pytest.raises(StoreFault, match="stayed locked by another process"):
            store.save_policy(make_file("cfg"))
        other.execute("ROLLBACK")
        store.save_policy(make_file("cfg"))
        assert len(store.policies()) == 2


# --- faults ----------------------------------------------------------------------------------


def test_a_full_disk_keeps_what_was_saved(database: Path, make_file: MakeFile) -> None:
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file())

    def limit(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA max_page_count=1").close()  # it stops at the present size

    event.listen(Pool, "connect", limit)
    try:
        with Store.open(str(database)) as store:
            large = make_file(hardware=make_file().hardware.model_copy(update={"cores": 9}))
            quality = {f"metric{n}": large.evidence.quality["psnr"] for n in range(500)}
            evidence = large.evidence.model_copy(update={"quality": quality})
            with pytest.raises(StoreFault, match="free some space"):
                store.save_and_activate(large.model_copy(update={"evidence": evidence}))
            assert [make_file()] == store.policies()
    finally:
        event.remove(Pool, "connect", limit)
    with Store.open(str(database)) as store:
        assert [make_file()] == store.policies()


def test_a_row_that_was_changed_is_never_given_out(database: Path, make_file: MakeFile) -> None:
    saved = make_file()
    with Store.open(str(database)) as store:
        store.save_and_activate(saved)
        with closing(sqlite3.connect(database)) as raw:
            raw.execute("UPDATE hardware SET body = replace(body, 'Test CPU', 'Fast CPU')")
            raw.commit()
        with pytest.raises(CorruptData, match="does not match its digest"):
            store.active(saved.hardware, saved.workload)


@given(keep=st.floats(0, 1.5), position=st.floats(0, 1), junk=st.binary(min_size=1, max_size=300))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_databases_give_an_error_or_the_truth(
    keep: float, position: float, junk: bytes, database: Path, make_file: MakeFile, tmp_path: Path
) -> None:
    if not database.exists():
        with Store.open(str(database)) as store:
            store.save_and_activate(make_file())
    data = bytearray(database.read_bytes())
    start = int(position * len(data))
    data[start : start + len(junk)] = junk
    damaged = tmp_path / "damaged.db"
    for leftover in tmp_path.glob("damaged.db*"):
        leftover.unlink()
    damaged.write_bytes(data[: int(keep * len(data))])
    try:
        with Store.open(str(damaged)) as store:
            assert {each.policy_id for each in store.policies()} <= {make_file().policy_id}
    except DituneError as error:
        assert "\n" not in str(error)
