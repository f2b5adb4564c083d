from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from ditune.db.digest import canonical, digest
from ditune.db.policy import (
    AdaptiveHandoff,
    BandedHandoff,
    Handoff,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.record import Timestamp, now
from ditune.db.records import Interval


def test_equal_policies_have_one_id_and_others_another() -> None:
    first = Policy(cache=MaskCache(actions=("full", "step")))
    again = Policy.model_validate_json('{"cache": {"actions": ["full", "step"], "kind": "mask"}}')
    assert first == again
    assert first.id == again.id == digest(again)
    assert first.id != Policy(cache=MaskCache(actions=("full", "cfg"))).id


def test_ids_leave_out_what_is_absent() -> None:
    assert canonical(Policy()) == b"{}"
    assert (
        canonical(Policy(handoff=Handoff(sigma=0.5)))
        == b'{"handoff":{"mode":"static","sigma":0.5}}'
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: MaskCache(actions=("step",)),
        lambda: MaskCache(actions=()),
        lambda: MaskCache(actions=("full", "skip")),  # type: ignore[arg-type]
        lambda: RuleCache(delta2=0.0),
        lambda: RuleCache(delta2=float("nan")),
        lambda: RuleCache(delta1_ratio=1.0),
        lambda: RuleCache(allowed=()),
        lambda: Payload(order=3),
        lambda: Payload(arc_length=(0.0,)),
        lambda: Payload(arc_length=(0.0, 1.0, 1.0)),
        lambda: MaskCache(actions=("full",) * 3, payload=Payload(arc_length=(0.0, 1.0))),
        lambda: RuleCache(indicator="first_block", fn_blocks=0),
        lambda: RuleCache(indicator="first_block", allowed=("step",)),
        lambda: Handoff(sigma=-1.0),
        lambda: Handoff(sigma=0.5, until=0.5),
        lambda: BandedHandoff(bands=()),
        lambda: BandedHandoff(bands=((0.2, 0.5),)),
        lambda: BandedHandoff(bands=((0.9, 0.5), (0.6, 0.1))),
        lambda: AdaptiveHandoff(min_frac=0.7, max_frac=0.6),
        lambda: Handoff(sigma=float("inf")),
        lambda: Interval(median="1", ci95=(1.0, 1.0), n=1),  # type: ignore[arg-type]
        lambda: Policy(speed=3),  # type: ignore[call-arg]
    ],
)
def test_what_makes_no_sense_cannot_be_built(build: object) -> None:
    assert callable(build)
    with pytest.raises(ValidationError):
        build()


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Payload().order = 0


def test_a_changed_copy_has_its_own_key() -> None:
    first = Policy(handoff=Handoff(sigma=0.5))
    before = first.id
    changed = first.model_copy(update={"handoff": None})
    assert changed.id == Policy().id
    assert before == first.id


def test_times_are_timestamps_whose_texts_sort() -> None:
    first, second = now(), now()
    assert TypeAdapter(Timestamp).validate_python(first) == first
    assert first <= second
    assert len(first) == len(second) == len("2026-01-02T03:04:05.000006Z")
