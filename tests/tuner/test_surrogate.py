"""What is fitted to a few masks holds for masks that nobody ran."""

from __future__ import annotations

import numpy as np
import pytest
from tests.tuner.test_schedule import trajectory_of

from ditune.db.policy import Action, MaskCache, Payload
from ditune.tuner.schedule import StepSchedules, gains
from ditune.tuner.surrogate import Seen, Surrogate

STEPS = 20
ARC = tuple(float(step) for step in range(STEPS))
LEVEL_DB = 12.0


@pytest.fixture(scope="module")
def schedules() -> StepSchedules:
    """Return the schedules of a path that turns."""
    random = np.random.default_rng(3)
    return StepSchedules([trajectory_of(np.cumsum(random.standard_normal((STEPS, 30)), axis=0))])


def mask(computed: tuple[int, ...], order: int = 1, form: str = "output") -> MaskCache:
    actions: list[Action] = ["full" if step in computed else "step" for step in range(STEPS)]
    payload = Payload(order=order, form=form, arc_length=ARC if order else None)  # type: ignore[arg-type]
    return MaskCache(actions=tuple(actions), payload=payload)


def true_level(schedules: StepSchedules, cache: MaskCache) -> float:
    """Return a quality in which late errors count the most, against all that is usual."""
    weights = gains(STEPS, 5.0) ** 2 * np.exp(np.linspace(-3.0, 1.0, STEPS + 1))
    computed = [step for step, action in enumerate(cache.actions) if action == "full"]
    where, _, squared = schedules.errors(computed)
    lost = 1.5 if cache.payload.form == "latent" else 0.0
    return LEVEL_DB - 10.0 * float(np.log10(squared @ weights[where])) - lost


def drawn(count: int, seed: int) -> list[MaskCache]:
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        chosen = random.choice(np.arange(1, STEPS), int(random.integers(4, 10)), replace=False)
        form = ("output", "latent")[number % 2]
        found.append(mask((0, *sorted(int(step) for step in chosen)), form=form))
    return found


def fitted(schedules: StepSchedules, count: int, shift_db: float | None = None) -> Surrogate:
    seen = [Seen(m, true_level(schedules, m), 0.2) for m in drawn(count, 0)]
    if shift_db is not None:
        first = seen[0]
        seen.append(Seen(first.cache, first.decibels + shift_db, 0.2, elsewhere=True))
    return Surrogate(schedules, seen, elsewhere_sd=3.0)


def test_more_trials_predict_better(schedules: StepSchedules) -> None:
    unseen = drawn(40, 1)
    truth = np.array([true_level(schedules, m) for m in unseen])
    errors = []
    for count in (2, 6, 16):
        values, sds = fitted(schedules, count).predict(unseen)
        errors.append(float(np.abs(values - truth).mean()))
        assert np.mean(np.abs(values - truth) < 2.0 * sds) > 0.8  # its doubts are honest
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.5


def test_masks_for_the_fitted_weights_are_better_than_the_usual_ones(
    schedules: StepSchedules,
) -> None:
    learnt = schedules.frontier(fitted(schedules, 16).weights)
    usual = schedules.frontier(gains(STEPS, 5.0) ** 2)
    gain = [
        true_level(schedules, mask(learnt[n - 1])) - true_level(schedules, mask(usual[n - 1]))
        for n in range(5, 12)
    ]
    assert min(gain) > -0.2
    assert float(np.mean(gain)) > 0.5


def test_long_gaps_may_be_worse_at_the_beginning(schedules: StepSchedules) -> None:
    lean, masks = np.linspace(1.5, -1.5, STEPS + 1), drawn(30, 2)

    def level(cache: MaskCache) -> float:
        computed = [step for step, action in enumerate(cache.actions) if action == "full"]
        where, reused, squared = schedules.errors(computed)
        growth = np.maximum(reused, 1) ** lean[where]
        return LEVEL_DB - 10.0 * float(np.log10(squared @ (gains(STEPS, 5.0)[where] ** 2 * growth)))

    known = Surrogate(schedules, [Seen(m, level(m), 0.2) for m in masks])
    assert known.powers[0] - known.powers[-1] > 1.5
    assert np.all(np.diff(known.powers) < 0.0)


def test_schedules_are_those_of_the_best_fit_and_of_others_that_are_possible(
    schedules: StepSchedules,
) -> None:
    known = fitted(schedules, 4)
    found = known.schedules()
    best = schedules.frontier(known.weights, known.powers)
    assert found[:STEPS] == best
    others = found[STEPS:]
    assert others and not set(others) & set(best)
    assert max(map(len, others)) <= STEPS // 2
    assert found == fitted(schedules, 4).schedules()
    surer = fitted(schedules, 16)
    assert len(surer.schedules()) < len(found)


def test_what_a_payload_changes_is_learnt(schedules: StepSchedules) -> None:
    known = fitted(schedules, 16)
    chosen = (0, 3, 7, 11, 15)
    values, sds = known.predict([mask(chosen), mask(chosen, form="latent"), mask(chosen, order=0)])
    assert values[0] - values[1] == pytest.approx(1.5, abs=0.4)
    assert values[0] - values[2] > 3.0  # nobody tried it: what is usual
    assert sds[2] > 2.0 * sds[0]


def test_other_prompts_shift_everything(schedules: StepSchedules) -> None:
    known = fitted(schedules, 16, shift_db=-2.0)
    shift, sd = known.elsewhere
    assert shift == pytest.approx(-2.0, abs=0.3)
    assert sd < 0.6
    here, _ = known.predict(drawn(3, 5))
    there, _ = known.predict(drawn(3, 5), elsewhere=True)
    assert there - here == pytest.approx(np.full(3, shift))
    _, unknown = fitted(schedules, 16).elsewhere
    assert unknown == pytest.approx(3.0, rel=0.01)


def test_one_trial_is_enough_to_begin(schedules: StepSchedules) -> None:
    cache = mask((0, 4, 9, 14))
    values, _ = Surrogate(schedules, [Seen(cache, 31.0)]).predict([cache])
    assert values[0] == pytest.approx(31.0, abs=0.01)
