"""What a session is asked for, and what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ditune.db.cost import Cost
from ditune.db.policy import Policy
from ditune.db.records import PolicyFile, Profile, Quality, Study, Trial
from ditune.tuner.fewer_steps import FewestSteps
from ditune.tuner.quality import PROOF_PROMPTS


@dataclass(frozen=True)
class Options:
    """How to search; the defaults suit a pipeline whose videos take seconds."""

    quality: str | None = None  # floors; the source's own by default
    tiers: str | None = None  # several sets of floors instead: see `tiers.split_tiers`
    trials: int = 20
    time_limit_s: float = float("inf")  # of profile and search; the proof takes what it needs
    seed: int = 0
    profile_prompts: int = 2
    search_prompts: int = 3
    confirm_prompts: int = PROOF_PROMPTS
    confirm_candidates: int = 8
    warm_start: bool = True  # try what was proved for the nearest model, hardware and steps first
    arguments: Mapping[str, str] = field(default_factory=dict)  # kept with the study, for resuming


@dataclass(frozen=True)
class FramePair:
    """The same prompt and seed, plain and tuned, frames [n, height, width, 3] in [0, 1]."""

    prompt: str
    plain: np.ndarray
    tuned: np.ndarray


@dataclass(frozen=True)
class TierResult:
    """What the search and the proof of one tier gave; no `policy_file` where none held."""

    study: Study
    trials: tuple[Trial, ...]
    policy_file: PolicyFile | None
    passed_over: tuple[str, ...]

    def best_seen(self) -> str:
        """Say in one sentence how close the search came, for a search that found nothing."""
        return _best_seen(self.trials)


@dataclass(frozen=True)
class Result:
    """Everything a session found; `policy_file` is None when no policy held the floors.

    Of a run with tiers it speaks of the first one; `tiers` has all of them by name, in order.
    """

    study: Study
    profile: Profile
    trials: tuple[Trial, ...]
    policy_file: PolicyFile | None
    passed_over: tuple[str, ...]
    notes: tuple[str, ...]
    frames: tuple[FramePair, ...]
    fewer_steps: FewestSteps | None  # None when no policy held either
    cost: Cost
    tiers: Mapping[str, TierResult] = field(default_factory=dict)  # empty where none was asked for

    @property
    def shipped(self) -> bool:
        """Whether there is a policy, of any tier."""
        found = (each.policy_file for each in self.tiers.values())
        return self.policy_file is not None or any(each is not None for each in found)

    def best_seen(self) -> str:
        """Say in one sentence how close the search came, for a search that found nothing."""
        return _best_seen(self.trials)


def _best_seen(trials: Sequence[Trial]) -> str:
    scored = [t for t in trials if t.policy != Policy() and t.violation]
    if not scored:
        return "no policy was tried"
    closest = min(scored, key=lambda t: max(t.violation.values()))
    seen = ", ".join(f"{k} {_value(k, q):.4g}" for k, q in closest.quality.items())
    return f"closest was trial {closest.number}: {closest.speedup:.2f}x with {seen}"


def _value(name: str, quality: Quality) -> float:
    return quality.worst if name.endswith("_worst") else quality.mean
