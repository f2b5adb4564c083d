from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditune.db.errors import CorruptData, DituneError
from ditune.db.readonly import find
from ditune.db.records import PolicyFile
from ditune.db.store import Store

MakeFile = Callable[..., PolicyFile]
ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "annotated_doc",
    "annotated_types",
    "ditune",
    "platformdirs",
    "pydantic",
    "pydantic_core",
    "rfc8785",
    "typing_extensions",
    "typing_inspection",
}


@pytest.fixture
def saved(store: Store, make_file: MakeFile) -> PolicyFile:
    policy_file = make_file()
    store.save_and_activate(policy_file)
    return policy_file


def look(database: Path, saved: PolicyFile, **changes: object) -> object:
    parts = {"hardware": saved.hardware, "software": saved.software, "workload": saved.workload}
    return find(database, **(parts | changes))  # type: ignore[arg-type]


def test_the_exact_key_is_found(database: Path, saved: PolicyFile) -> None:
    match = look(database, saved)
    assert "exact" == match.kind  # type: ignore[attr-defined]
    assert saved.policy == match.policy  # type: ignore[attr-defined]
    assert saved.evidence == match.evidence  # type: ignore[attr-defined]


def test_a_patch_release_is_compatible_and_says_unvalidated(
    database: Path, saved: PolicyFile
) -> None:
    software = saved.software.model_copy(update={"torch": "2.13.5", "triton": None})
    match = look(database, saved, software=software)
    assert "compatible" == match.kind  # type: ignore[attr-defined]
    assert "unvalidated" in match.reason  # type: ignore[attr-defined]
    assert "torch 2.13.0 -> 2.13.5" in match.reason  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("part", "field", "value", "says"),
    [
        ("software", "diffusers", "0.43.0", "diffusers 0.42.1 -> 0.43.0"),
        ("software", "torch", "3.0.0", "other versions"),
        ("hardware", "device_name", "Other", "for this hardware"),
        ("hardware", "power_limit_w", 300.0, "for this hardware"),
        ("workload", "steps", 5, "steps 4 there, 5 here"),
        ("workload", "dtype", "bfloat16", "dtype float32 there, bfloat16 here"),
        ("workload", "guidance", False, "guidance"),
    ],
)
def test_anything_else_is_the_baseline_and_says_why(
    database: Path, saved: PolicyFile, part: str, field: str, value: object, says: str
) -> None:
    changed = getattr(saved, part).model_copy(update={field: value})
    match = look(database, saved, **{part: changed})
    assert "baseline" == match.kind  # type: ignore[attr-defined]
    assert match.policy is None  # type: ignore[attr-defined]
    assert says in match.reason  # type: ignore[attr-defined]


def test_other_tiers_and_missing_files_are_the_baseline(
    database: Path, saved: PolicyFile, tmp_path: Path
) -> None:
    assert "baseline" == look(database, saved, tier="fast").kind  # type: ignore[attr-defined]
    match = look(tmp_path / "none.db", saved)
    assert "no policy database" in match.reason  # type: ignore[attr-defined]


def test_looking_never_writes(database: Path, saved: PolicyFile) -> None:
    before = database.read_bytes()
    names = {path.name for path in database.parent.iterdir()}
    look(database, saved)
    assert before == database.read_bytes()
    assert names == {path.name for path in database.parent.iterdir()}


def test_a_policy_that_was_changed_in_place_is_refused(
    database: Path, store: Store, saved: PolicyFile
) -> None:
    with store._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE policy SET body = replace(body, '\"step\"', '\"cfg\"')")
    with pytest.raises(CorruptData, match="no longer fits its id"):
        look(database, saved)


@given(cut=st.floats(0, 1), position=st.floats(0, 1), junk=st.binary(min_size=1, max_size=300))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_databases_never_crash_a_lookup(
    cut: float, position: float, junk: bytes, database: Path, saved: PolicyFile, tmp_path: Path
) -> None:
    data = bytearray(database.read_bytes())
    start = int(position * len(data))
    data[start : start + len(junk)] = junk
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(data[: max(1, int((0.2 + cut) * len(data)))])
    try:
        match = look(damaged, saved)
    except DituneError:
        return
    assert match.policy in (None, saved.policy)  # type: ignore[attr-defined]


def test_a_lookup_loads_nothing_heavy(database: Path, saved: PolicyFile, tmp_path: Path) -> None:
    (tmp_path / "saved.json").write_text(saved.model_dump_json())
    code = f"""
import sys, ditune
from pathlib import Path
from ditune.db.records import PolicyFile
saved = PolicyFile.model_validate_json(Path({str(tmp_path / "saved.json")!r}).read_text())
match = ditune.lookup(
    saved.hardware, saved.workload, software=saved.software, db={str(database)!r}
)
assert match.policy_id == saved.policy_id, match
print(*sorted({{name.partition(".")[0] for name in sys.modules}} - set(sys.stdlib_module_names)))
"""
    seen = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n{code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name for name in seen.stdout.split() if not name.startswith(("_", "__"))}
    assert loaded <= ALLOWED, f"a lookup loads {sorted(loaded - ALLOWED)}"
