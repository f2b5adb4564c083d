"""Several trade-offs for one pipeline: which one a call takes, and when a change takes effect."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from diffusers import WanPipeline
from tests.db.conftest import file_of

from ditune.accel.apply import Applied, accelerate
from ditune.accel.fingerprint import detect
from ditune.db.errors import UsageFault
from ditune.db.policy import MaskCache, Policy
from ditune.db.store import Store

STEPS = 12
CALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "guidance_scale": 5.0,
}
Generate = Any


def mask(every: int) -> Policy:
    """Return a mask that computes the first two steps, and then one of so many."""
    return Policy(
        cache=MaskCache(
            actions=tuple("full" if n < 2 or n % every == 0 else "step" for n in range(STEPS))
        )
    )


HIGH, FAST = mask(2), mask(4)


@pytest.fixture
def db(pipe: WanPipeline, tmp_path: Path) -> Path:
    """Return a database with two tiers of the tiny pipeline, the first one also the default."""
    hardware, software, workload = detect(pipe, CALL)
    facts = {"hardware": hardware, "software": software, "workload": workload}
    path = tmp_path / "policies.db"
    with Store.open(str(path)) as store:
        store.save_and_activate(file_of(HIGH, **facts), ("high", "default"))
        store.save_and_activate(file_of(FAST, **facts), ("fast",))
    return path


def used(applied: Applied) -> str | None:
    return applied.summary().policy_id


def test_a_tier_is_taken_for_all_calls_or_for_some(
    pipe: WanPipeline, generate: Generate, db: Path
) -> None:
    with accelerate(pipe, db=db) as applied:
        generate(pipe)
        assert used(applied) == HIGH.id
    with accelerate(pipe, db=db, tier="fast") as applied:
        generate(pipe)
        assert used(applied) == FAST.id
        with applied.using("high") as same:
            assert same is applied
            generate(pipe)
            assert used(applied) == HIGH.id
            with applied.using("fast"):
                generate(pipe)
                assert used(applied) == FAST.id
            generate(pipe)
            assert used(applied) == HIGH.id
        generate(pipe)
        assert used(applied) == FAST.id


def test_a_call_keeps_the_tier_that_it_began_with(
    pipe: WanPipeline, generate: Generate, db: Path
) -> None:
    with ExitStack() as chosen, accelerate(pipe, db=db) as applied:

        def change(pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                chosen.enter_context(applied.using("fast"))
            return given

        generate(pipe, callback_on_step_end=change)
        assert used(applied) == HIGH.id
        cache = HIGH.cache
        assert isinstance(cache, MaskCache)
        assert applied.summary().steps["full"] == cache.actions.count("full")
        generate(pipe)
        assert used(applied) == FAST.id


def test_after_an_error_the_calls_are_as_before(
    pipe: WanPipeline, generate: Generate, db: Path
) -> None:
    with accelerate(pipe, db=db) as applied:
        with pytest.raises(ZeroDivisionError), applied.using("fast"):
            raise ZeroDivisionError
        generate(pipe)
        assert used(applied) == HIGH.id


def test_an_unknown_tier_runs_plain_and_says_which_there_are(
    pipe: WanPipeline, generate: Generate, db: Path
) -> None:
    with accelerate(pipe, db=db) as applied:
        with applied.using("draft"):
            generate(pipe)
            summary = applied.summary()
        assert summary.policy_id is None
        assert "no policy of tier 'draft' for this hardware and workload" in summary.reason
        assert summary.reason.endswith("only default, fast, high")
        generate(pipe)
        assert used(applied) == HIGH.id


def test_a_policy_that_was_given_has_no_tiers(pipe: WanPipeline, db: Path) -> None:
    with (
        accelerate(pipe, FAST, db=db) as applied,
        pytest.raises(UsageFault, match="no tier 'high' to choose: the policy was given"),
        applied.using("high"),
    ):
        raise AssertionError("never entered")
