from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import optuna
import pytest
import torch
from optuna.trial import TrialState
from tests.tuner.test_schedule import trajectory_of

from ditune.accel.apply import Summary
from ditune.db.engine import study_storage_url
from ditune.db.policy import Action, Handoff, MaskCache, Policy, RuleCache
from ditune.db.records import (
    Hardware,
    LayerTiming,
    Profile,
    Settings,
    Software,
    StepRedundancy,
    Study,
    Trial,
    Workload,
)
from ditune.db.store import Store
from ditune.tuner.evaluate import Case, Outcome, one_by_one
from ditune.tuner.here import Here
from ditune.tuner.pace import candidates, fastest_held
from ditune.tuner.quality import parse_constraints
from ditune.tuner.search import Budget, Search
from ditune.tuner.space import Space
from ditune.tuner.verdict import trial_of

STEPS = 20
STUDY = "study-1"
FLOORS = parse_constraints("psnr>=35,psnr_worst>=27")


def prior(number: int, policy: Policy) -> Trial:
    """Return a trial that a ladder proposed and that ran to its end."""
    return Trial(
        uuid=str(number),
        study="study-1",
        number=number,
        source="prior",
        policy=policy,
        state="complete",
        speedup=2.0,
        work_ratio=2.0,
        quality={},
        violation={},
        reason=None,
        duration_s=1.0,
        created_at="2026-01-01T00:00:00Z",
    )


def profile(guidance: bool = True) -> Profile:
    """Return a profile by hand."""
    return Profile(
        hardware=Hardware(
            device_name="test", kind="cpu", capability="avx2", cores=2, memory_bytes=1
        ),
        software=Software(torch="2", triton=None, diffusers="0", transformers="5", ditune="0"),
        workload=Workload(
            pipeline_class="WanPipeline",
            transformer_class="WanTransformer3DModel",
            model_digest="sha256:" + "0" * 64,
            model_revision=None,
            dtype="float32",
            height=32,
            width=32,
            frames=13,
            steps=STEPS,
            scheduler_class="Euler",
            scheduler_shift=8.0,
            guidance=guidance,
            batch=1,
            attention_backend="native",
        ),
        prompts=1,
        total_ms=100.0,
        layers=tuple(
            LayerTiming(name=f"transformer.blocks.{i}", median_ms=1, p20_ms=1, p80_ms=1, n=9)
            for i in range(10)
        ),
        redundancy=tuple(
            StepRedundancy(
                step=i,
                sigma=1.0 - i / STEPS,
                step_change=None if i == 0 else 0.05 + 0.01 * i,
                cfg_change=None,
                block_change=None,
            )
            for i in range(STEPS)
        ),
        disagreement=None,
        peak_bytes=None,
        clocks=None,
    )


class ScriptedEvaluator:
    """Answers from a formula and counts its calls: quality falls with the share of reused steps."""

    constraints = FLOORS
    device = torch.device("cpu")
    videos = 0.0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def plain_values(self, case: Case) -> dict[str, float]:
        return {"psnr": 100.0}

    def run(
        self,
        policy: Policy,
        cases: Sequence[Case],
        *,
        pairs: int,
        stop: Callable[[list[Outcome]], bool],
    ) -> Iterator[Outcome]:
        self.calls.append(policy.id)
        yield from one_by_one(
            lambda case, paired: self._outcome(policy, case, paired=paired), cases, pairs, stop
        )

    def _outcome(self, policy: Policy, case: Case, *, paired: bool) -> Outcome:
        reused = 0.0
        if isinstance(policy.cache, MaskCache):
            reused = 1.0 - policy.cache.actions.count("full") / STEPS
        ratio = 1.0 / (1.0 - reused)
        summary = Summary(policy.id, "", {}, 40, 40, 0, ratio, 0, 0, ())
        psnr = 60.0 - 45.0 * reused - case.seed % 3
        return Outcome(case, {"psnr": psnr}, 100.0 / ratio, 100.0 if paired else None, summary)


def study() -> Study:
    """Return the study that is searched here."""
    found = profile()
    settings = Settings(
        hardware=found.hardware,
        software=found.software,
        workload=found.workload,
        constraints=FLOORS,
        prompts_digest="sha256:" + "c" * 64,
        seed=0,
        space="sha256:" + "d" * 64,
    )
    return Study(name=STUDY, settings=settings, created_at="2026-01-01T00:00:00Z")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Return a store that knows the study."""
    with Store.open(str(tmp_path / "ours.db")) as opened:
        opened.save_study(study())
        yield opened


def search(store: Store) -> tuple[Search, ScriptedEvaluator]:
    evaluator = ScriptedEvaluator()
    cases = [Case("a", 0), Case("b", 1), Case("c", 2)]
    found = Search(STUDY, Space(profile(), handoff=False), evaluator, cases, seed=0)  # type: ignore[arg-type]
    found.open(study_storage_url(store.where), store)
    return found, evaluator


def test_baseline_comes_first_and_the_search_finds_something_faster(store: Store) -> None:
    found, _ = search(store)
    trials = found.run(Budget(trials=14), lambda *_: None)
    assert [t.source for t in trials[:2]] == ["baseline", "prior"]
    assert [t.source for t in trials].count("default") == 1
    assert Policy() == trials[0].policy
    assert list(range(14)) == [t.number for t in trials]
    best = candidates(trials, 3, found.space.pace(trials))
    assert best[0].speedup is not None and best[0].speedup > 1.5
    assert all(t.feasible for t in best)


def test_an_explicit_mask_is_tried_as_it_stands(store: Store) -> None:
    reused: list[Action] = ["step"] * 9
    cache = MaskCache(actions=("full", *reused, "full", *reused))
    found, evaluator = search(store)
    proposal = found.space.explicit(cache)
    found._ladders.next = lambda done: proposal if len(done) == 1 else None  # type: ignore[method-assign]
    found.run(Budget(trials=2), lambda *_: None)
    assert [t.policy for t in store.trials("study-1")] == [Policy(), Policy(cache=cache)]
    assert evaluator.calls == [Policy(cache=cache).id]
    told = found.study.trials[1].params
    assert told["compute_frac"] == 2 / STEPS
    assert (told["order"], told["form"]) == (1, "output")


def test_a_policy_is_never_measured_twice(store: Store) -> None:
    found, evaluator = search(store)
    trials = found.run(Budget(trials=14), lambda *_: None)
    assert len(set(evaluator.calls)) == len(evaluator.calls) == 13  # the first one is plain
    assert len({trial.policy.id for trial in trials}) == 14


def test_every_trial_takes_all_prompts_in_an_order_of_its_own(store: Store) -> None:
    found, _ = search(store)
    trials = found.run(Budget(trials=14), lambda *_: None)
    orders = {tuple(score.seed for score in t.scores) for t in trials if t.state == "complete"}
    assert {tuple(sorted(order)) for order in orders} == {
        tuple(sorted(case.seed for case in found.cases))
    }
    assert len(orders) > 1


def test_masks_are_timed_until_their_speed_follows_from_their_work(store: Store) -> None:
    def masked(computed: int) -> Policy:
        actions: list[Action] = ["full" if step < computed else "step" for step in range(STEPS)]
        return Policy(cache=MaskCache(actions=tuple(actions)))

    found, _ = search(store)
    timed = []
    for computed in (8, 10, 12, 14, 16):
        work = STEPS / computed
        changes = {"speedup": 0.9 * work, "work_ratio": work, "pairs": 1}
        timed.append(prior(computed, masked(computed)).model_copy(update=changes))
    assert found._job(masked(11), "prior", timed[:4]).pairs == 1
    job = found._job(masked(11), "prior", timed)
    assert job.pairs == 0
    assert job.expected_speedup == pytest.approx(0.9 * STEPS / 11, rel=0.02)
    trial = trial_of(job, Here(found.evaluator).run(job), 1.0)
    assert (trial.state, trial.pairs, trial.speedup) == ("complete", 0, job.expected_speedup)
    assert found._job(Policy(cache=RuleCache()), "search", timed).pairs == 1


def test_a_sampler_that_repeats_itself_spends_no_budget(store: Store) -> None:
    found, evaluator = search(store)
    found._proposed = lambda done: found.space.prior(7) if done else found.space.baseline()  # type: ignore[method-assign]
    trials = found.run(Budget(trials=5), lambda *_: None)
    assert [trial.number for trial in trials] == [0, 1]  # plain, and the one that is asked for
    assert len(evaluator.calls) == 1


def test_every_told_trial_carries_all_its_constraints(store: Store) -> None:
    found, _ = search(store)
    found.run(Budget(trials=10), lambda *_: None)
    for trial in found.study.trials:
        if trial.state == optuna.trial.TrialState.COMPLETE:
            assert {"psnr", "psnr_worst"} == set(trial.constraints)


def test_a_resumed_study_goes_on_where_it_stopped(store: Store) -> None:
    first, _ = search(store)
    first.run(Budget(trials=4), lambda *_: None)
    first.study.ask()  # a process that died in the middle of a trial
    second, evaluator = search(store)
    trials = second.run(Budget(trials=9), lambda *_: None)
    assert len(trials) == 9
    assert len(evaluator.calls) <= 5
    assert not second.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))


def test_no_time_left_means_no_trial(store: Store) -> None:
    found, evaluator = search(store)
    assert found.run(Budget(trials=5, seconds=0.0), lambda *_: None) == []
    assert not evaluator.calls


@pytest.mark.parametrize(("source", "rejected"), [("default", True), ("prior", False)])
def test_what_is_slower_than_what_holds_is_given_up_unless_it_teaches(
    store: Store, source: Literal["default", "prior"], rejected: bool
) -> None:
    found, _ = search(store)
    slow = MaskCache(actions=("full", "full", "full", "step") * (STEPS // 4))
    proposals = [found.space.baseline(), found.space.prior(STEPS // 2)]
    proposals += [replace(found.space.explicit(slow), source=source)]
    found._ladders.next = lambda done: proposals[len(done)]  # type: ignore[method-assign]
    *_, held, trial = found.run(Budget(trials=3), lambda *_: None)
    assert held.feasible
    assert trial.policy == Policy(cache=slow)
    assert (trial.state == "rejected") == rejected
    if not rejected:
        return
    assert trial.reason == "it is slower than what is known to hold: at most 1.33x by its work"
    assert [len(trial.scores), trial.quality["psnr"].n] == [1, 1]
    told = found.study.trials[2]
    assert (told.state, set(told.constraints)) == (TrialState.COMPLETE, set(trial.violation))
    assert told.values == [pytest.approx(15 / 20)]


def test_so_many_trials_are_made_however_little_time_there_is(store: Store) -> None:
    found, evaluator = search(store)
    assert len(found.run(Budget(trials=5, seconds=-1.0, least=2), lambda *_: None)) == 2
    assert len(evaluator.calls) == 1  # the first one is plain


def test_no_speed_is_asked_where_it_is_not_certain(store: Store) -> None:
    found, evaluator = search(store)
    done = found.run(Budget(trials=8), lambda *_: None)
    fastest = fastest_held(done, found.space.pace(done))
    assert fastest is not None and fastest > 1.5
    policy = found.space.policy(found.space.default().parameters)
    assert found._to_beat(policy, "search", done) == 0.98 * fastest
    assert found._to_beat(policy, "search", done[:1]) is None  # only the plain pipeline held
    assert found._to_beat(policy, "prior", done) is None
    assert found._to_beat(Policy(handoff=Handoff(sigma=0.5)), "search", done) is None
    evaluator.constraints = parse_constraints("judge>=-0.03")  # it counts
    assert found._to_beat(policy, "search", done) is None


@pytest.mark.parametrize("guidance", [True, False])
def test_every_proposal_spells_a_valid_policy(guidance: bool) -> None:
    space = Space(profile(guidance), handoff=True)
    proposals = [space.baseline(), space.default(), space.prior(7)]
    policies = [space.policy(p.parameters) for p in proposals]
    assert Policy() == policies[0]
    assert all(p.cache is not None for p in policies[1:])
    assert ("cfg_share" in space.distributions) == guidance
    assert space.digest != Space(profile(guidance), handoff=False).digest


def test_a_prior_computes_as_many_steps_as_it_is_asked_to() -> None:
    space = Space(profile(), handoff=False)
    for budget in range(space.fewest, STEPS):
        cache = space.policy(space.prior(budget).parameters).cache
        assert isinstance(cache, MaskCache)
        assert budget == cache.actions.count("full")


def test_handoff_lies_between_two_noise_levels() -> None:
    space = Space(profile(), handoff=True)
    point = space.baseline().parameters | {"handoff": "static", "handoff_frac": 0.4}
    handoff = space.policy(point).handoff
    assert isinstance(handoff, Handoff)
    assert pytest.approx((1.0 - 7 / STEPS + 1.0 - 8 / STEPS) / 2) == handoff.sigma


def test_what_the_surrogate_asks_for_is_seen_to_its_end(store: Store) -> None:
    random = np.random.default_rng(7)
    outputs = np.cumsum(random.standard_normal((STEPS, 30)), axis=0)
    space = Space(profile(), handoff=False, trajectories=[trajectory_of(outputs)])
    found, _ = search(store)
    blind = found.run(Budget(trials=6), lambda *_: None)  # without trajectories nothing is foreseen
    policy = found.space.policy(found.space.prior(9).parameters)
    assert found._job(policy, "prior", blind).expected
    found.space = space
    assert not found._job(policy, "prior", blind).expected
    assert not found._job(policy, "warm", blind).expected
    assert found._job(policy, "search", blind).expected
