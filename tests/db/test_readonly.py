from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditune.db import readonly
from ditune.db.errors import CorruptData, DituneError, UsageFault
from ditune.db.readonly import find
from ditune.db.records import Match, PolicyFile
from ditune.db.store import Store

MakeFile = Callable[..., PolicyFile]
ReadOnly = Callable[[Path], AbstractContextManager[None]]
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "annotated_doc",
    "annotated_types",
    "ditune",
    "pydantic",
    "pydantic_core",
    "rfc8785",
    "typing_extensions",
    "typing_inspection",
}


@pytest.fixture
def saved(database: Path, make_file: MakeFile) -> PolicyFile:
    """Return a policy that is active in `database`, which nobody has open."""
    policy_file = make_file()
    with Store.open(str(database)) as store:
        store.save_and_activate(policy_file)
    return policy_file


def look(database: Path, saved: PolicyFile, **changes: Any) -> Match:
    parts = {"hardware": saved.hardware, "software": saved.software, "workload": saved.workload}
    return find(database, **(parts | changes))


def change(database: Path, *statements: str) -> None:
    with closing(sqlite3.connect(database)) as raw:
        for statement in statements:
            raw.execute(statement)
        raw.commit()


# --- answers ---------------------------------------------------------------------------------


def test_the_exact_key_is_found(database: Path, saved: PolicyFile) -> None:
    match = look(database, saved)
    assert match.kind == "exact"
    assert saved.policy_id == match.policy_id
    assert saved.policy == match.policy
    assert saved.evidence == match.evidence


def test_other_patch_releases_are_compatible_and_say_so(database: Path, saved: PolicyFile) -> None:
    software = saved.software.model_copy(
        update={"torch": "2.13.5+cu130", "triton": None, "ditune": "0.2.0"}
    )
    match = look(database, saved, software=software)
    assert match.kind == "compatible"
    assert saved.policy == match.policy
    assert "unvalidated" in match.reason
    for difference in ("torch 2.13.0 (here 2.13.5+cu130)", "triton 3.7.1 (here none)"):
        assert difference in match.reason
    assert "diffusers" not in match.reason


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("software", {"diffusers": "0.43.0"}, "diffusers 0.42.1 (here 0.43.0)"),
        ("software", {"torch": "2.1.13"}, "torch 2.13.0 (here 2.1.13)"),
        ("software", {"transformers": "nightly"}, "transformers 5.23.0 (here nightly)"),
        ("hardware", {"device_name": "Other"}, "no policy for this hardware (Other)"),
        ("hardware", {"power_limit_w": 300.0}, "power_limit_w (None, here 300.0)"),
        ("workload", {"steps": 5}, "differs in steps (4, here 5)"),
        ("workload", {"dtype": "bfloat16", "batch": 2}, "dtype (float32, here bfloat16), batch"),
        ("workload", {"guidance": False}, "guidance (True, here False)"),
    ],
)
def test_anything_else_is_the_baseline_and_says_why(
    database: Path, saved: PolicyFile, part: str, changes: dict[str, Any], says: str
) -> None:
    match = look(database, saved, **{part: getattr(saved, part).model_copy(update=changes)})
    assert match.kind == "baseline"
    assert match.policy is None
    assert match.policy_id is None
    assert says in match.reason


def test_the_nearest_workload_is_named_but_never_used(
    database: Path, saved: PolicyFile, make_file: MakeFile
) -> None:
    far = saved.workload.model_copy(update={"steps": 50, "height": 64, "width": 64})
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file(workload=far))
    match = look(database, saved, workload=far.model_copy(update={"steps": 49}))
    assert match.kind == "baseline"
    assert match.reason.endswith("differs in steps (50, here 49)")


def test_what_is_stored_but_not_active_is_not_used(database: Path, make_file: MakeFile) -> None:
    with Store.open(str(database)) as store:
        store.save_policy(make_file())
    assert look(database, make_file()).kind == "baseline"


def test_tiers_are_kept_apart(database: Path, saved: PolicyFile) -> None:
    match = look(database, saved, tier="fast")
    assert match.kind == "baseline"
    assert "no policy of tier 'fast'" in match.reason
    assert match.reason.endswith("only default")


def test_a_missing_file_is_the_baseline(tmp_path: Path, make_file: MakeFile) -> None:
    for path in (tmp_path / "none.db", tmp_path / "no" / "none.db", tmp_path / ("x" * 300)):
        match = look(path, make_file())
        assert match.kind == "baseline"
        assert "does not exist" in match.reason
    assert list(tmp_path.iterdir()) == []


# --- access ----------------------------------------------------------------------------------


def test_a_lookup_sees_what_a_live_store_committed(
    database: Path, saved: PolicyFile, make_file: MakeFile
) -> None:
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file("cfg"))
        before = database.read_bytes()
        assert make_file("cfg").policy == look(database, saved).policy
        assert before == database.read_bytes()


def test_a_read_only_folder_is_read(
    open_folder: Path, make_file: MakeFile, read_only: ReadOnly
) -> None:
    database = open_folder / "names with # and ?.db"
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file())
    with read_only(open_folder):
        assert look(database, make_file()).kind == "exact"
    assert [database] == list(open_folder.iterdir())


def test_unmerged_changes_on_read_only_media_are_not_overlooked(
    open_folder: Path, make_file: MakeFile, read_only: ReadOnly
) -> None:
    database = open_folder / "policies.db"
    log = open_folder / "policies.db-wal"
    with Store.open(str(database)) as store:
        store.save_and_activate(make_file())
        kept = log.read_bytes()
    log.write_bytes(kept)
    with read_only(open_folder), pytest.raises(CorruptData, match=r"policies\.db-wal"):
        look(database, make_file())


def test_a_file_that_may_not_be_read_is_named(
    open_folder: Path, make_file: MakeFile, read_only: ReadOnly
) -> None:
    database = open_folder / "policies.db"
    Store.open(str(database)).close()
    database.chmod(0o000)
    with read_only(open_folder), pytest.raises(UsageFault, match="permissions"):
        look(database, make_file())


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE policy SET body = replace(body, '\"step\"', '\"cfg\"')", "match its digest"),
        ("UPDATE software SET body = replace(body, '2.13.0', '2.13.1')", "match its digest"),
        ("UPDATE policy SET body = '{\"x\": 1}'", "not a valid Policy at x"),
        ("UPDATE evidence SET body = '[]'", "not a valid Evidence"),
        ("UPDATE policy SET schema_version = 2", "upgrade ditune"),
        ("UPDATE ditune_alembic_version SET version_num = '9.9.9'", "has the schema 9.9.9"),
        ("DELETE FROM ditune_alembic_version", "has the schema none"),
        ("DROP TABLE active", "no such table"),
        ("ALTER TABLE evidence DROP COLUMN created_at", ""),
        ("CREATE VIEW v AS SELECT 1", "it has v, which ditune never made"),
        ("UPDATE evidence SET hardware_key = 'elsewhere'", "proved elsewhere"),
    ],
)
def test_what_was_changed_in_place_is_refused(
    database: Path, saved: PolicyFile, statement: str, says: str
) -> None:
    change(database, statement)
    if not says:  # what the lookup does not read cannot mislead it
        assert look(database, saved).kind == "exact"
        return
    with pytest.raises(CorruptData, match=says):
        look(database, saved)


def test_an_enormous_body_is_refused(database: Path, saved: PolicyFile) -> None:
    change(database, "UPDATE policy SET body = json_quote(printf('%.*c', 5000000, 'x'))")
    with pytest.raises(CorruptData, match="too big"):
        look(database, saved)


def test_a_locked_file_is_no_damage(
    database: Path, saved: PolicyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readonly, "LOCK_WAIT_S", 0.05)
    change(database, "PRAGMA journal_mode=DELETE")
    with closing(sqlite3.connect(database, isolation_level=None)) as raw:
        raw.execute("BEGIN EXCLUSIVE")
        with pytest.raises(DituneError, match="cannot be read now") as caught:
            look(database, saved)
    assert not isinstance(caught.value, CorruptData)


@given(keep=st.floats(0, 1.5), position=st.floats(0, 1), junk=st.binary(min_size=1, max_size=300))
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_databases_never_crash_a_lookup(
    keep: float, position: float, junk: bytes, database: Path, saved: PolicyFile, tmp_path: Path
) -> None:
    data = bytearray(database.read_bytes())
    start = int(position * len(data))
    data[start : start + len(junk)] = junk
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(data[: int(keep * len(data))])
    try:
        match = look(damaged, saved)
    except DituneError:
        return
    assert match.policy in (None, saved.policy)


# --- weight ----------------------------------------------------------------------------------


def test_a_lookup_loads_nothing_heavy(database: Path, saved: PolicyFile, tmp_path: Path) -> None:
    wanted = tmp_path / "saved.json"
    wanted.write_text(saved.model_dump_json())
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "src")!r})
before = set(sys.modules)
from pathlib import Path
from ditune.db import policy_file
from ditune.db.readonly import find
saved = policy_file.read(Path({str(wanted)!r}))
match = find(Path({str(database)!r}), saved.hardware, saved.software, saved.workload)
assert match.policy == saved.policy, match
loaded = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(loaded - set(sys.stdlib_module_names)))
"""
    command = [sys.executable, "-I", "-c", code]
    seen = subprocess.run(command, capture_output=True, text=True, check=True)
    # the standard library's own build settings carry the platform in their module's name
    loaded = {name for name in seen.stdout.split() if not name.startswith("_sysconfigdata")}
    assert "ditune" in loaded
    assert loaded <= ALLOWED, f"a lookup loads {sorted(loaded - ALLOWED)}"
