"""What a session has to find: each of its tiers, with the space, videos and trials for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditune.db.records import Constraint, Settings
from ditune.profiler.record import Recorded
from ditune.tuner.evaluate import Case, Evaluator, cases_of
from ditune.tuner.quality import cases_needed, cases_to_search, counts, needs_reference
from ditune.tuner.result import Options
from ditune.tuner.source import Source
from ditune.tuner.space import Space
from ditune.tuner.studies import settings_of
from ditune.tuner.tiers import Tier

SEARCH_SEED = 1_000  # noise seeds of the search and of confirmation never meet
CONFIRM_SEED = 500_000
_LATER_SHARE, _LATER_LEAST = 3, 5  # a tier after others tries a third of the trials, five at least


@dataclass(frozen=True)
class Goal:
    """One tier with everything that its search and its proof need."""

    tier: Tier
    evaluator: Evaluator
    space: Space
    settings: Settings
    trials: int  # how many policies to try
    share: float  # of the time that is left for searching
    search_cases: tuple[Case, ...]
    proof_cases: tuple[Case, ...]


def goals_of(
    tiers: Sequence[Tier],
    evaluator: Evaluator,
    options: Options,
    recorded: Recorded,
    note: Callable[[str], None],
) -> list[Goal]:
    """Return every tier with what it needs; the first one tries the most policies.

    Args:
        tiers: In order.
        evaluator: Of the source; the plain videos are shared.
        options: How to search.
        recorded: What the plain pipeline costs and gave.
        note: Called with a sentence about everything that differs from what was asked for.
    """
    most = options.trials
    later = min(most, max(_LATER_LEAST, round(most / _LATER_SHARE)))
    trials = [most, *[later] * (len(tiers) - 1)]
    spaces: dict[bool, Space] = {}
    goals = []
    for number, tier in enumerate(tiers):
        scored = evaluator.under(tier.constraints)
        handing = _may_hand_off(evaluator.source, tier, note)
        if handing not in spaces:
            spaces[handing] = _space(recorded, note, handing=handing)
        space = spaces[handing]
        videos = _proof_videos(options.confirm_prompts, tier.constraints, note)
        goals.append(
            Goal(
                tier=tier,
                evaluator=scored,
                space=space,
                settings=settings_of(scored, recorded.profile, space, options.seed),
                trials=trials[number],
                share=trials[number] / sum(trials[number:]),
                search_cases=tuple(search_cases(evaluator.source, options, tier.constraints)),
                proof_cases=tuple(cases_of(evaluator.source.held_out, videos, CONFIRM_SEED)),
            )
        )
    return goals


def search_cases(source: Source, options: Options, constraints: Sequence[Constraint]) -> list[Case]:
    """Return the videos that a search under these floors measures each policy on."""
    count = options.search_prompts
    if any(map(counts, constraints)):
        count = max(count, cases_to_search(constraints))
    return cases_of(source.calibration, count, SEARCH_SEED)


def _space(recorded: Recorded, note: Callable[[str], None], *, handing: bool) -> Space:
    space = Space(recorded.profile, handoff=handing, trajectories=recorded.trajectories)
    if handing and not space.hands_over:
        note("the hand-off is left out: the scheduler tells no noise levels")
    return space


def _may_hand_off(source: Source, tier: Tier, note: Callable[[str], None]) -> bool:
    """Whether the hand-off belongs into the space; says so when it does not."""
    if source.small is None:
        return False
    if needs_reference(tier.constraints):
        note(
            "the hand-off to the small model is left out: it changes content, which a "
            "same-seed floor (psnr, ssim) cannot allow; use judge floors alone to search it"
        )
        return False
    return True


def _proof_videos(
    asked: int, constraints: Sequence[Constraint], note: Callable[[str], None]
) -> int:
    """Return how many videos the proof takes: metrics that count need many."""
    needed = cases_needed(constraints)
    if needed > asked:
        note(
            f"the proof takes {needed} videos instead of {asked}: floors on shares of right "
            "videos cannot be proved with fewer"
        )
    return max(asked, needed)
