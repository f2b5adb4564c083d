from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.db.conftest import file_of

from ditune.db import policy_file
from ditune.db.errors import CorruptData, UsageFault
from ditune.db.policy import (
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.records import PolicyFile, SearchFigures

MakeFile = Callable[..., PolicyFile]
GOLDEN = Path(__file__).resolve().parents[2] / "db" / "schemas" / "policy-1.json"
RENEW = "DITUNE_RENEW_GOLDEN"

arcs = st.lists(st.floats(0, 1e4), min_size=2, max_size=60, unique=True).map(sorted).map(tuple)
payloads = st.builds(
    Payload,
    form=st.sampled_from(["hidden", "output"]),
    order=st.integers(0, 1),
    arc_length=st.none() | arcs,
)
masks = st.builds(
    MaskCache,
    actions=st.lists(st.sampled_from(["full", "step", "cfg", "block"]), max_size=60).map(
        lambda rest: ("full", *rest)
    ),
    payload=payloads.map(lambda payload: payload.model_copy(update={"arc_length": None})),
    fn_blocks=st.integers(0, 40),
    bn_blocks=st.integers(0, 40),
)
rules = st.builds(
    RuleCache,
    warmup_frac=st.floats(0, 1),
    delta2=st.floats(0, 10, exclude_min=True),
    delta1_ratio=st.floats(0, 1, exclude_min=True, exclude_max=True),
    payload=payloads,
)
handoffs = st.one_of(
    st.builds(
        Handoff, sigma=st.floats(1, 1000), until=st.none() | st.floats(0, 0.9, exclude_min=True)
    ),
    st.just(BandedHandoff(bands=((0.9, 0.5), (0.5, 0.0)))),
    st.builds(AdaptiveHandoff, signal=st.sampled_from(["denoised", "latent", "output"])),
)
policies = st.builds(
    Policy,
    cache=st.none() | masks | rules,
    handoff=st.none() | handoffs,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


def quick(examples: int) -> settings:
    """Return settings for tests that may share their fixtures between examples."""
    shared = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, suppress_health_check=shared)


def data_of(saved: PolicyFile) -> bytes:
    return saved.model_dump_json(indent=2).encode()


@given(policy=policies)
@quick(60)
def test_every_policy_survives_a_file(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    saved = file_of(policy)
    policy_file.write(saved, path)
    assert saved == policy_file.read(path)
    assert [path] == list(tmp_path.iterdir())


@given(where=st.floats(0, 1), junk=st.binary(min_size=1, max_size=4), insert=st.booleans())
@quick(300)
def test_no_changed_policy_is_ever_accepted(
    where: float, junk: bytes, insert: bool, make_file: MakeFile
) -> None:
    saved = make_file()
    data = bytearray(data_of(saved))
    start = int(where * len(data))
    data[start : start if insert else start + len(junk)] = junk
    try:
        found = policy_file.check(bytes(data), "the file")
    except CorruptData:
        return
    assert saved.policy == found.policy
    assert found.policy.id == found.policy_id


@given(value=json_values)
@quick(80)
def test_other_json_is_refused_with_a_sentence(value: object) -> None:
    with pytest.raises(CorruptData, match="the file"):
        policy_file.check(json.dumps(value).encode(), "the file")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 500_000, "deeper"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "deeper"),
        (b'"' + b'\\"' * 500_000, "not JSON"),
        (b" " * ((1 << 20) + 1), "larger than"),
        (b'{"schema_version": 1, "schema_version": 1}', "twice"),
        (b'{"schema_version": 7}', "upgrade ditune"),
        (b'{"schema_version": 1}', "Field required"),
        (b"1" * 5000, "not JSON"),
        (b'{"policy": NaN}', "not a valid PolicyFile"),
    ],
)
def test_hostile_files_are_refused_with_a_sentence(data: bytes, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        policy_file.check(data, "the file")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("policy", "cache", "actions", 3), "block", "does not match its digest"),
        (("policy", "cache", "fn_blocks"), 1 << 60, "canonical form"),
        (("hardware", "memory_bytes"), 1 << 60, "canonical form"),
        (("policy", "cache", "fn_blocks"), -1, "policy.cache.mask.fn_blocks"),
        (("policy", "cache", "module"), "os.system", "Extra inputs"),
        (("policy", "cache", "kind"), "pickle", "policy.cache"),
        (("policy_id",), "sha256:../../etc/passwd", "policy_id"),
        (("evidence", "status"), "true", "evidence.status"),
        (("workload", "steps"), "4", "workload.steps"),
    ],
)
def test_changed_values_are_named(
    make_file: MakeFile, path: tuple[str | int, ...], value: object, says: str
) -> None:
    body = make_file().model_dump(mode="json")
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(CorruptData, match=says) as caught:
        policy_file.check(json.dumps(body).encode(), "the file")
    assert "\n" not in str(caught.value)


def test_brackets_inside_strings_are_no_nesting(make_file: MakeFile) -> None:
    hardware = make_file().hardware.model_copy(update={"device_name": '[[{"\\' * 30})
    saved = make_file(hardware=hardware)
    assert saved == policy_file.check(data_of(saved), "the file")


def test_files_that_cannot_be_read_or_written(make_file: MakeFile, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match=r"none\.json cannot be read"):
        policy_file.read(tmp_path / "none.json")
    with pytest.raises(UsageFault, match=r"policy\.json cannot be written"):
        policy_file.write(make_file(), tmp_path / "nowhere" / "policy.json")
    (tmp_path / "folder").mkdir()
    for attempt in (policy_file.read, lambda path: policy_file.write(make_file(), path)):
        with pytest.raises(UsageFault, match="folder cannot be"):
            attempt(tmp_path / "folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_read_only_folder_keeps_the_old_file(
    make_file: MakeFile,
    open_folder: Path,
    read_only: Callable[[Path], AbstractContextManager[None]],
) -> None:
    path = open_folder / "policy.json"
    policy_file.write(make_file("step"), path)
    with read_only(open_folder), pytest.raises(UsageFault, match="Permission denied"):
        policy_file.write(make_file("cfg"), path)
    assert make_file("step") == policy_file.read(path)


def test_a_written_file_honours_the_umask(make_file: MakeFile, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        policy_file.write(make_file(), tmp_path / "policy.json")
    finally:
        os.umask(before)
    assert (tmp_path / "policy.json").stat().st_mode & 0o777 == 0o640


def test_files_from_before_the_figures_of_the_search_are_read(make_file: MakeFile) -> None:
    saved = make_file()
    old = json.loads(data_of(saved))
    del old["evidence"]["search"]
    assert saved == policy_file.check(json.dumps(old).encode(), "the file")
    quality = saved.evidence.quality
    seen = SearchFigures(trials=20, prompts=3, pairs=1, speedup=2.1, quality=quality)
    evidence = saved.evidence.model_copy(update={"search": seen})
    new = saved.model_copy(update={"evidence": evidence})
    assert new == policy_file.check(data_of(new), "the file")


def test_the_schema_is_the_published_one() -> None:
    text = json.dumps(policy_file.json_schema(), indent=2, sort_keys=True) + "\n"
    if os.environ.get(RENEW) == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"renew with {RENEW}=1 if this is meant"
