"""What a search starts from: the nearest proved policies, tried once, before anything else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.landscapes import SEARCH_PROMPTS, Landscape, Simulated
from benchmarks.simulated import even_profile
from tests.db.conftest import EVIDENCE, file_of
from tests.tuner.searches import Formula, Searching, quiet, searching, store, url
from tests.tuner.test_frontier import PROOF_PROMPTS, computed, level_db, tried
from tests.tuner.test_ladders import ended
from tests.tuner.test_schedule import trajectory_of
from tests.tuner.test_search import STEPS, STUDY, prior, profile, study

from ditune.db.engine import study_storage_url
from ditune.db.policy import Handoff, MaskCache, Policy, RuleCache
from ditune.db.records import PolicyFile, Quality, Settings, Study, Trial
from ditune.db.store import Store
from ditune.tuner.evaluate import cases_of
from ditune.tuner.frontier import proposed
from ditune.tuner.ladders import Ladders
from ditune.tuner.search import Budget, Search
from ditune.tuner.space import Space
from ditune.tuner.warm_start import warm_start

__all__ = ["searching", "store", "url"]  # the fixtures
HERE = profile()
OTHER = "sha256:" + "e" * 64


def mask(full_every: int, steps: int = STEPS) -> Policy:
    actions = ["full" if step % full_every == 0 else "step" for step in range(steps)]
    return Policy(cache=MaskCache(actions=tuple(actions)))  # type: ignore[arg-type]


def proved(
    policy: Policy, *, hardware: Any = None, evidence: Any = None, **workload: Any
) -> PolicyFile:
    """Return a policy that another search proved, by default for all that this one is for."""
    return file_of(
        policy,
        hardware=HERE.hardware.model_copy(update=hardware or {}),
        workload=HERE.workload.model_copy(update=workload),
        evidence=EVIDENCE.model_copy(update={"study": "study-2", **(evidence or {})}),
    )


class Listed:
    """A store of some policies, the last stored first."""

    def __init__(self, *files: PolicyFile) -> None:
        self._files = files

    def policies_of(self, transformer_class: str) -> list[PolicyFile]:
        return [f for f in self._files if f.workload.transformer_class == transformer_class]


def order(*files: PolicyFile) -> list[str]:
    """Return the ids of what a search begins with."""
    found = warm_start(Listed(*files), study(), Space(HERE, handoff=False))
    return [p.policy.id for p in found.proposals if p.policy is not None]


def ids(*policies: Policy) -> list[str]:
    return [policy.id for policy in policies]


def test_the_nearest_come_first_and_three_at_most() -> None:
    a, b, c, d = (mask(every) for every in (2, 3, 4, 5))
    gpu = {"kind": "cuda", "device_name": "GPU"}
    near_hardware, near_steps = proved(a, steps=40), proved(b, hardware={"cores": 64})
    assert order(near_steps, near_hardware) == [order(near_hardware)[0], b.id]
    assert order(proved(a, hardware=gpu), proved(b, hardware={"cores": 64})) == ids(b, a)
    assert order(proved(a, model_digest=OTHER), proved(b, hardware=gpu)) == ids(b, a)
    assert order(
        proved(a, model_digest=OTHER, pipeline_class="Other"), proved(b, model_digest=OTHER)
    ) == ids(b, a)
    assert order(proved(a, height=64), proved(b, frames=14)) == ids(b, a)
    assert order(proved(a, dtype="bfloat16"), proved(b)) == ids(b, a)
    steps = [proved(mask(2, n), steps=n) for n in (10, 80, 16)]
    assert order(*steps) == [order(steps[n])[0] for n in (2, 0)]  # of 80 all are too near
    assert order(*(proved(p, height=8 * 2**n) for n, p in enumerate((a, b, c, d)))) == ids(c, b, d)


def test_the_nearest_floors_come_first() -> None:
    def with_floors(**floors: float) -> dict[str, Any]:
        kept = {n: Quality(floor=f, mean=f, worst=f, n=12) for n, f in floors.items()}
        return {"quality": kept}

    same, looser, other = mask(2), mask(3), mask(4)
    assert order(
        proved(other, evidence=with_floors(ssim=0.9)),
        proved(looser, evidence=with_floors(psnr=30.0, psnr_worst=22.0)),
        proved(same, evidence=with_floors(psnr=35.0, psnr_worst=27.0)),
    ) == ids(same, looser, other)


def test_what_proves_nothing_here_is_left_out() -> None:
    assert order(proved(mask(2), transformer_class="OtherTransformer")) == []
    assert order(proved(mask(2), evidence={"status": "predicted"})) == []
    assert order(proved(mask(2), evidence={"study": STUDY})) == []  # it is this search's own
    assert order(proved(Policy(handoff=Handoff(sigma=0.5)))) == []
    assert order(proved(mask(2)), proved(mask(2), dtype="bfloat16")) == ids(mask(2))
    nothing = warm_start(Listed(), study(), Space(HERE, handoff=False))
    assert (nothing.proposals, nothing.note) == ((), "")


def test_a_note_says_what_a_search_began_with() -> None:
    files = proved(mask(2)), proved(mask(3), steps=40, hardware={"cores": 64})
    said = warm_start(Listed(*files), study(), Space(HERE, handoff=False)).note
    assert "2 proved policies of other searches" in said
    assert f"{files[0].policy_id[7:19]} (20 steps on test, 1.80x there)" in said
    assert "40 steps on test" in said


def test_a_search_begins_with_them_and_going_on_repeats_nothing(
    store: Store, url: str, searching: Searching
) -> None:
    store.save_and_activate(proved(mask(2)))
    store.save_policy(proved(Policy(cache=RuleCache()), steps=40))
    store.save_policy(proved(mask(4), transformer_class="OtherTransformer"))
    first = searching(store, url, Formula())
    found = warm_start(store, study(), first.space)
    assert [p.source for p in found.proposals] == ["warm", "warm"]
    first.start_from(found.proposals)
    trials = first.run(Budget(4), quiet)
    assert [t.source for t in trials] == ["baseline", "warm", "warm", "prior"]
    assert trials[1].policy == mask(2)
    assert isinstance(trials[2].policy.cache, RuleCache)
    told = first.study.trials[1]
    assert (told.user_attrs["source"], told.params["compute_frac"]) == ("warm", 0.5)
    again = searching(store, url, runner := Formula())
    again.start_from(warm_start(store, study(), again.space).proposals)
    assert [t.source for t in again.run(Budget(6), quiet)].count("warm") == 2
    assert len(runner.ran) == 2


def test_several_at_once_are_asked_for_one_after_the_other(
    store: Store, url: str, searching: Searching
) -> None:
    store.save_policy(proved(mask(2)))
    store.save_policy(proved(mask(3)))
    search = searching(store, url)
    search.start_from(warm_start(store, study(), search.space).proposals)
    done = search._recovered()
    for _ in range(4):
        search._ask(done, by_chance=False)
    pending = sorted(store.jobs.unfinished(STUDY).values(), key=lambda job: job.number)
    assert [job.source for job in pending] == ["baseline", "warm", "warm", "prior"]


@pytest.fixture(scope="module")
def foreseen() -> Space:
    random = np.random.default_rng(7)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    return Space(profile(), handoff=False, trajectories=[trajectory_of(outputs)])


def warm_trial(number: int, policy: Policy, level: float) -> Trial:
    return tried(number, policy, level).model_copy(update={"source": "warm"})


def test_one_result_of_a_carried_mask_is_enough_to_foresee_others(foreseen: Space) -> None:
    policy = mask(3)
    trials = [tried(0, Policy(), 100.0), warm_trial(1, policy, level_db(foreseen, policy))]
    found = proposed(foreseen, trials, PROOF_PROMPTS)
    assert found is not None
    assert found.policy is not None  # of the surrogate; a first guess spells none
    assert found.policy != policy


def test_while_it_is_on_its_way_first_guesses_go_on_from_it(foreseen: Space) -> None:
    unseen = {"quality": {}, "violation": {"psnr": 1.0}}
    trials = [tried(0, Policy(), 100.0)]
    policy = mask(2)
    trials.append(warm_trial(1, policy, 50.0).model_copy(update=unseen))
    found = proposed(foreseen, trials, PROOF_PROMPTS)
    assert found is not None
    assert computed(foreseen.policy(found.parameters)) == computed(policy)
    assert computed(policy) > math.sqrt(foreseen.fewest * STEPS) + 1


@pytest.mark.parametrize(("holds", "most"), [(True, 5), (False, STEPS)])
def test_a_ladder_goes_on_below_a_carried_mask_that_held(holds: bool, most: int) -> None:
    """One that missed may only be the wrong mask for this model: the ladder begins as usual."""
    space = Space(profile(), handoff=False)
    carried = prior(1, mask(4)).model_copy(update={"source": "warm"})
    done = [ended(prior(0, Policy()), holds=True), ended(carried, holds=holds)]
    usual = Ladders(space).next(done[:1])
    found = Ladders(space).next(done)
    assert found is not None
    assert usual is not None
    assert computed(space.policy(found.parameters)) < most
    assert holds or found == usual


# --- a landscape of 50 steps whose policy for 25 is known -----------------------------------------


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Store]:
    with Store.open(str(tmp_path / "ours.db")) as opened:
        yield opened


def test_a_policy_for_half_the_steps_gives_a_first_trial_near_it(memory: Store) -> None:
    landscape = Landscape(3, "smooth")
    space, there = landscape.space(), even_profile()
    steps = [0, 1, 3, 6, 10, 14, 18, 21, 23, 24]
    half = MaskCache(actions=tuple("full" if n in steps else "step" for n in range(25)))
    memory.save_policy(
        file_of(
            Policy(cache=half),
            hardware=there.hardware,
            workload=there.workload.model_copy(update={"steps": 25}),
        )
    )
    evaluator = Simulated(landscape, 0)
    settings = Settings(
        hardware=there.hardware,
        software=there.software,
        workload=there.workload,
        constraints=evaluator.constraints,
        prompts_digest=OTHER,
        seed=0,
        space=space.digest,
    )
    begun = Study(name=settings.study, settings=settings, created_at="2026-01-01T00:00:00Z")
    memory.save_study(begun)
    search = Search(begun.name, space, evaluator, cases_of(SEARCH_PROMPTS, 3, 0), seed=0)
    search.start_from(warm_start(memory, begun, space).proposals)
    search.open(study_storage_url(memory.where), memory)
    with closing(search):
        trials = search.run(Budget(3), quiet)
    cache = trials[1].policy.cache
    assert isinstance(cache, MaskCache)
    assert [n for n, a in enumerate(cache.actions) if a == "full"] == [2 * n for n in steps]
    assert [trial.source for trial in trials] == ["baseline", "warm", "prior"]
    # one result tells the level: what comes next is the surrogate's, and nearer to the floor
    level = trials[1].quality["psnr"].mean
    assert abs(trials[2].quality["psnr"].mean - 36.5) < abs(level - 36.5)
