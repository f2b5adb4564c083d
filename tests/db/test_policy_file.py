from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ditune.db import policy_file
from ditune.db.errors import CorruptData, DituneError, UsageFault
from ditune.db.records import Handoff, MaskCache, Payload, Policy, PolicyFile, RuleCache

MakeFile = Callable[..., PolicyFile]
GOLDEN = Path(__file__).resolve().parents[2] / "db" / "schemas" / "policy-1.json"
RENEW = "DITUNE_RENEW_GOLDEN"

payloads = st.builds(Payload, form=st.sampled_from(["hidden", "output"]), order=st.integers(0, 1))
masks = st.builds(
    MaskCache,
    actions=st.lists(st.sampled_from(["full", "step", "cfg", "block"]), max_size=60).map(
        lambda rest: ("full", *rest)
    ),
    payload=payloads,
    fn_blocks=st.integers(0, 40),
    bn_blocks=st.integers(0, 40),
)
rules = st.builds(
    RuleCache,
    warmup_frac=st.floats(0, 1),
    delta2=st.floats(0.001, 10),
    delta1_ratio=st.floats(0.01, 0.99),
    payload=payloads,
)
policies = st.builds(
    Policy,
    cache=st.none() | masks | rules,
    handoff=st.none() | st.builds(Handoff, sigma=st.floats(0.001, 1000)),
)


@given(policy=policies)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_policy_survives_a_file(policy: Policy, make_file: MakeFile, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    saved = make_file(policy=policy, policy_id=policy.id)
    policy_file.write(saved, path)
    assert saved == policy_file.read(path)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_policy_is_ever_accepted(position: int, byte: int, make_file: MakeFile) -> None:
    saved = make_file()
    data = bytearray(json.dumps(saved.model_dump(mode="json", exclude_none=True)).encode())
    data[position % len(data)] = byte
    try:
        found = policy_file.parse(bytes(data), "the file")
    except DituneError:
        return
    assert saved.policy == found.policy


@given(value=st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists))
@settings(max_examples=100)
def test_other_json_is_refused_with_a_sentence(value: object) -> None:
    with pytest.raises(CorruptData, match="the file"):
        policy_file.parse(json.dumps(value).encode(), "the file")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 5000, "nested"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested"),
        (b" " * ((1 << 20) + 1), "larger than"),
        (b'{"schema_version": 1, "schema_version": 1}', "stands twice"),
        (b'{"schema_version": 7}', "upgrade ditune"),
        (b'{"schema_version": 1}', "Field required"),
        (b"1" * 5000, "no JSON"),
    ],
)
def test_hostile_files_are_refused_with_a_sentence(data: bytes, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        policy_file.parse(data, "the file")


def test_brackets_inside_strings_are_no_nesting(make_file: MakeFile) -> None:
    hardware = make_file().hardware.model_copy(update={"device_name": '[[{"' * 40})
    saved = make_file(hardware=hardware)
    data = json.dumps(saved.model_dump(mode="json", exclude_none=True)).encode()
    assert saved == policy_file.parse(data, "the file")


def test_a_changed_policy_is_named_so(make_file: MakeFile) -> None:
    body = make_file().model_dump(mode="json", exclude_none=True)
    body["policy"]["cache"]["actions"][3] = "block"
    with pytest.raises(CorruptData, match="was changed after it was written"):
        policy_file.parse(json.dumps(body).encode(), "the file")


def test_files_that_cannot_be_read_or_written(make_file: MakeFile, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="cannot read the policy file"):
        policy_file.read(tmp_path / "none.json")
    with pytest.raises(UsageFault, match="cannot write the policy file"):
        policy_file.write(make_file(), tmp_path / "nowhere" / "policy.json")
    assert [] == list(tmp_path.iterdir())


def test_the_schema_is_the_published_one() -> None:
    text = json.dumps(policy_file.json_schema(), indent=2) + "\n"
    if os.environ.get(RENEW) == "1":
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), f"renew with {RENEW}=1 if this is meant"
