from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ditune.accel.apply import Summary
from ditune.db.policy import MaskCache, Policy
from ditune.db.records import Evidence, Quality, SearchFigures, Trial
from ditune.tuner.confirm import Confirmation, Listed, Looked, Proof, Provenance, confirm, missed
from ditune.tuner.evaluate import Case, Outcome
from ditune.tuner.quality import parse_constraints

FLOORS = parse_constraints("psnr>=35,psnr_worst>=27")
CASES = [Case(f"prompt {i}", i) for i in range(12)]
PROMPTS = "sha256:" + "1" * 64
ORIGIN = Provenance("study-1", PROMPTS)


def trial(number: int) -> Trial:
    actions = ("full",) * (number + 1) + ("step",) * (10 - number)
    return Trial(
        uuid=str(number),
        study="study-1",
        number=number,
        source="search",
        policy=Policy(cache=MaskCache(actions=actions)),  # type: ignore[arg-type]
        state="complete",
        speedup=2.0,
        work_ratio=2.0,
        quality={"psnr": Quality(floor=35.0, mean=40.0, worst=39.0, n=4)},
        violation={"psnr": -0.1},
        reason=None,
        duration_s=1.0,
        created_at="2026-01-01T00:00:00Z",
    )


class Scripted:
    """Gives each policy the PSNRs and latency that the script lists, and counts what was run."""

    constraints = FLOORS

    def __init__(self, script: dict[int, tuple[list[float], float]]) -> None:
        self.script = {trial(n).policy.id: answer for n, answer in script.items()}
        self.tuned_runs = self.plain_runs = 0
        self.known: set[Case] = set()

    def knows(self, case: Case) -> bool:
        return case in self.known

    def measure(self, policy: Policy, case: Case, *, paired: bool) -> Outcome:
        psnrs, tuned_ms = self.script[policy.id]
        self.tuned_runs += 1
        self.plain_runs += paired or case not in self.known
        self.known.add(case)
        summary = Summary(policy.id, "", {}, 1, 1, 0, 2.0, 0, 0, ())
        values = {"psnr": psnrs[case.seed]}
        return Outcome(case, values, tuned_ms + case.seed % 3, 100.0 if paired else None, summary)


def spread(mean: float, by: float = 0.5) -> list[float]:
    return [mean + by * (i % 3 - 1) for i in range(12)]


def run(script: dict[int, tuple[list[float], float]]) -> tuple[Scripted, Confirmation]:
    evaluator = Scripted(script)
    proof = Proof(evaluator, CASES)  # type: ignore[arg-type]
    return evaluator, confirm(proof, Listed([trial(n).policy for n in script]), ORIGIN)


def evidence_of(found: Confirmation) -> Evidence:
    assert found.evidence is not None
    return found.evidence


def test_the_first_candidate_that_holds_ships_with_its_own_figures() -> None:
    _, found = run({0: (spread(40), 50.0), 1: (spread(44), 60.0)})
    assert trial(0).policy == found.policy
    evidence = evidence_of(found)
    assert evidence.candidates == 1
    assert evidence.speedup.n == 12
    assert 1.9 < evidence.speedup.median < 2.0
    assert evidence.quality["psnr_worst"].worst == 39.5
    assert evidence.bound_by == "psnr"
    assert evidence.status == "measured"
    assert evidence.prompts_digest == PROMPTS


def test_a_candidate_whose_bound_misses_is_passed_over() -> None:
    evaluator, found = run({0: (spread(35.4, 1.0), 40.0), 1: (spread(40), 50.0)})
    assert trial(1).policy == found.policy
    assert evidence_of(found).candidates == 2
    assert "certain only above" in found.reasons[0]
    assert (evaluator.tuned_runs, evaluator.plain_runs) == (12 + 12 + 6, 12 + 6)
    assert evidence_of(found).speedup.n == 6


def test_noisy_latencies_get_more_pairs() -> None:
    evaluator, found = run({0: (spread(35.4, 1.0), 40.0), 1: (spread(40), 5.0)})
    assert trial(1).policy == found.policy
    assert evidence_of(found).speedup.n == 12
    assert evaluator.plain_runs == 12 + 12


def test_each_speedup_rests_on_pairs_of_that_candidate() -> None:
    early = [40.0] * 5 + [26.0] * 7  # given up at the sixth prompt
    evaluator, found = run({0: (early, 20.0), 1: (spread(40), 50.0)})
    assert (evaluator.tuned_runs, evaluator.plain_runs) == (6 + 12, 12)
    assert 1.9 < evidence_of(found).speedup.median < 2.0
    assert evidence_of(found).speedup.n == 6


def test_a_bad_candidate_is_given_up_early() -> None:
    evaluator, found = run({0: (spread(30), 40.0), 1: ([40.0, 26.0, *spread(40)[2:]], 40.0)})
    assert found.policy is None
    assert (evaluator.tuned_runs, evaluator.plain_runs) == (4 + 2, 4)
    assert "psnr_worst 26 < 27" in found.reasons[1]


def test_wide_scatter_is_no_proof_for_the_worst_prompt() -> None:
    _, found = run({0: (spread(37, 8.0), 40.0)})
    assert found.policy is None


def test_a_policy_that_is_not_certainly_faster_does_not_ship() -> None:
    _, found = run({0: (spread(40), 99.5)})
    assert found.policy is None
    assert "not certainly faster" in found.reasons[0]


class Faster:
    """Some candidates, all of them looked at."""

    def __init__(self, *numbers: int) -> None:
        self.policies = [trial(number).policy for number in numbers]

    def next(self, looked: Sequence[Looked]) -> Policy | None:
        return self.policies[len(looked)] if len(looked) < len(self.policies) else None


@pytest.mark.parametrize(("last_ms", "shipped"), [(40.0, 2), (99.5, 1)])
def test_of_those_that_hold_the_last_is_timed_unless_it_is_slow(
    last_ms: float, shipped: int
) -> None:
    script = {0: (spread(44), 60.0), 1: (spread(42), 50.0), 2: (spread(40), last_ms)}
    evaluator = Scripted(script)
    found = confirm(Proof(evaluator, CASES), Faster(0, 1, 2), ORIGIN)  # type: ignore[arg-type]
    assert found.policy == trial(shipped).policy
    timed = 1 if shipped == 2 else 2
    assert evaluator.plain_runs == 12 + 6 * timed
    assert ("not certainly faster" in "".join(found.reasons)) == (shipped == 1)
    assert evidence_of(found).candidates == 3


def test_what_the_search_saw_of_the_winner_is_kept_apart() -> None:
    evaluator = Scripted({0: (spread(40), 50.0), 1: (spread(44), 60.0)})
    winner = trial(0).policy
    tried = trial(0).model_copy(update={"pairs": 1, "speedup": 2.5})

    def seen(*trials: Trial) -> SearchFigures | None:
        origin = Provenance("study-1", PROMPTS, trials)
        proof = Proof(evaluator, CASES)  # type: ignore[arg-type]
        return evidence_of(confirm(proof, Listed([winner]), origin)).search

    figures = seen(trial(1), tried)
    assert figures == SearchFigures(
        trials=2, prompts=4, pairs=1, speedup=2.5, quality=tried.quality
    )
    # without a pair the speedup is no measured one, and what was never tried gave nothing
    estimated = seen(tried.model_copy(update={"pairs": 0}))
    assert estimated is not None
    assert (estimated.speedup, estimated.prompts) == (None, 4)
    assert seen(trial(1)) == SearchFigures(trials=1, prompts=0, pairs=0, speedup=None, quality={})
    assert seen() is None


def test_nothing_to_confirm() -> None:
    _, found = run({})
    assert (found.policy, found.evidence, found.looked_at) == (None, None, 0)


def given_up(scores: np.ndarray) -> int:
    """Return after how many prompts a candidate is given up, or how many there are if never."""
    floors = parse_constraints("psnr>=35")
    values = [{"psnr": float(score)} for score in scores]
    seen = (n for n in range(1, len(values)) if missed(floors, values[:n], len(values) - n))
    return next(seen, len(values))


@pytest.mark.parametrize(("mean", "most"), [(32.0, 6), (34.0, 10)])
def test_what_will_hardly_hold_is_given_up(mean: float, most: int) -> None:
    random = np.random.default_rng(0)
    ends = [given_up(random.normal(mean, 2.0, 20)) for _ in range(100)]
    assert np.median(ends) <= most


def test_little_is_lost_by_giving_up_early() -> None:
    """Of what would pass on all prompts, one in ten may be given up; of what is good, none."""
    random = np.random.default_rng(1)
    floors = parse_constraints("psnr>=35")
    for mean, least in ((36.0, 0.85), (37.0, 0.97)):
        passing = kept = 0
        for _ in range(400):
            scores = random.normal(mean, 2.0, 20)
            if not missed(floors, [{"psnr": float(s)} for s in scores], 0):
                passing += 1
                kept += given_up(scores) == 20
        assert passing > 100
        assert kept / passing >= least


def test_shares_of_right_videos_are_given_up_alike() -> None:
    floors = parse_constraints("judge_digit>=-0.01")
    worse = [{"judge_digit": float(-(n % 10 == 0))} for n in range(200)]
    assert "too little to prove" in missed(floors, worse, 800)
    same = [{"judge_digit": 0.0}] * 100
    assert not missed(floors, same, 900)
    assert not missed(floors, [{"judge_digit": 0.0}] * 200, 0)
    assert "certain only above" in missed(floors, same, 0)
