"""Search problems whose truth is known: what a policy gives, the noise on it, the best there is.

An error of a reused step grows with the age of what is reused, at a rate that differs from step to
step; errors add up over a video. So the best mask of every budget is found exactly. A profile shows
the rates only in part, as real ones do: how far outputs move, not by how much an error that is made
there grows until the end. Prompts differ and latencies are noisy. On one kind of landscape quality
falls off a cliff where too long a gap comes early; on another each prompt falls off one of its own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from benchmarks.simulated import STEPS, profile_of, trajectories_of
from scipy import stats
from scipy.ndimage import gaussian_filter1d

from ditune.accel.apply import Summary
from ditune.accel.trigger import Measured, trigger_for
from ditune.db.policy import Action, CachePolicy, Granularity, MaskCache, Payload, Policy
from ditune.tuner.evaluate import Case, Outcome, one_by_one
from ditune.tuner.quality import parse_constraints
from ditune.tuner.space import Space

Kind = Literal["smooth", "cliff", "own cliffs"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SEARCH_PROMPTS = tuple(f"prompt {n}" for n in range(0, 200, 2))
PROOF_PROMPTS = tuple(f"prompt {n}" for n in range(1, 200, 2))
FLOORS = "psnr>=35,psnr_worst>=27"
_MEAN_FLOOR, _WORST_FLOOR = 35.0, 27.0
_PLAIN_MS, _REST = 1_000.0, 0.08  # of a plain call, and the share of it outside the steps
_REUSED = 0.01  # what a reused step costs, in full steps
_CAP_DB = 100.0
_PROMPT_SD, _OWN_SD = 2.5, 0.5  # dB: between prompts, and of a policy on a prompt
_LATENCY_SD, _OUTLIERS = 0.02, 0.05
_CLIFF_DB, _CLIFF_WIDTH = 9.0, 0.2  # depth; width, in logs of a gap's cost
_CLIFF_SPREAD = {"cliff": 0.25, "own cliffs": 1.0}  # between prompts, in logs of a gap's cost
_UNSEEN, _PROMISED = 20, 0.9  # prompts, and how often the worst of so many holds its floor
_EARLY = STEPS // 3


@dataclass
class Landscape:
    """One problem, drawn from a seed.

    Attributes:
        seed: Of everything in it.
        kind: Whether quality falls off a cliff where too long a gap comes early, and whether that
            is nearly the same for all prompts.
    """

    seed: int
    kind: Kind
    rates: np.ndarray = field(init=False)  # [steps]: error that a reused step of age 1 adds
    growth: float = field(init=False)  # power of the age with which it grows
    payload_db: dict[str, float] = field(init=False)  # what a payload loses against the usual one
    offset_db: float = field(init=False)
    edge: float = field(init=False)  # cost of an early gap at which every second prompt falls

    def __post_init__(self) -> None:
        """Draw the problem; its scale is set so that the best mask has 8 to 16 of 50 steps."""
        random = np.random.default_rng([self.seed, KINDS.index(self.kind)])
        place = np.arange(STEPS) / STEPS
        made = np.exp((1.0 - place) ** 3 + place**6 + _smooth(random, 0.5))
        early = math.exp(random.normal(math.log(5.0), 0.7))
        gain = 1.0 + early * (1.0 - place) ** random.uniform(2.5, 6.0)
        self.rates = made * gain**2
        self.growth = random.uniform(3.0, 5.0)
        self.payload_db = {
            "order 0": 7.0,
            "order 1": 0.0,
            "order 2": max(random.normal(0.5, 1.5), -2.0),
            "output": 0.0,
            "latent": max(random.normal(1.0, 1.5), -2.0),
            "hidden": max(random.normal(0.5, 1.5), -2.0),
            "arc_length": 0.0,
            "step": max(random.normal(1.0, 1.0), -1.0),
        }
        budget = int(random.integers(8, 17))
        least, chosen = self._shortest(budget)
        self.offset_db = _MEAN_FLOOR + 10.0 * math.log10(least * self._best_payload)
        self.edge = 1.5 * self._early_gap(chosen)
        self._shown = made**0.5 * np.exp(_smooth(random, 0.25))
        self._draws = int(random.integers(2**31))

    def space(self) -> Space:
        """Return the space that a search gets: a profile, and two noisy plain trajectories."""
        shown = trajectories_of(self._shown, self._draws)
        return Space(profile_of(shown), handoff=False, trajectories=shown)

    # --- the truth -------------------------------------------------------------------------------

    def true_speedup(self, policy: Policy) -> float:
        """Return the speedup without noise."""
        if policy.cache is None:
            return 1.0
        masks = [self.executed(policy.cache, case) for case in _typical(policy.cache)]
        return float(np.median([1.0 / self.share_of(policy.cache, mask) for mask in masks]))

    def margin_db(self, policy: Policy) -> float:
        """Return by how much the floor with the least room is held; below zero it is broken."""
        cache = policy.cache
        if cache is None:
            return _CAP_DB - _MEAN_FLOOR
        masks = [self.executed(cache, case) for case in _typical(cache)]
        levels = np.concatenate([self._levels(cache, mask) for mask in masks])
        worst = self._worst(levels)
        return min(float(levels.mean()) - _MEAN_FLOOR, worst - _WORST_FLOOR)

    @cached_property
    def best(self) -> tuple[float, int]:
        """The greatest true speedup of all masks that hold the floors, and its computed steps."""
        for budget in range(2, STEPS):
            for limit in self._limits():
                _, chosen = self._shortest(budget, limit)
                if chosen and self._mask_margin(chosen) >= 0.0:
                    return 1.0 / self.share_of(None, _actions(chosen)), budget
        return 1.0, STEPS

    def _mask_margin(self, chosen: Sequence[int]) -> float:
        levels = self._db(self._cost(chosen) * self._best_payload) - self._fallen_db(chosen)
        return min(float(levels.mean()) - _MEAN_FLOOR, self._worst(levels) - _WORST_FLOOR)

    @cached_property
    def _best_payload(self) -> float:
        forms = ("output", "latent", "hidden")
        named = product(("order 0", "order 1", "order 2"), forms, ("arc_length", "step"))
        return float(10.0 ** (min(sum(self.payload_db[n] for n in names) for names in named) / 10))

    def _limits(self) -> list[float]:
        """Return the longest early gaps to allow, as costs, the most first."""
        return (
            [math.inf, *(self.edge * f for f in np.geomspace(4.0, 0.05, 16))]
            if self.kind in _CLIFF_SPREAD
            else [math.inf]
        )

    def _gap(self, start: int, stop: int) -> float:
        """Return what reusing all steps between two computed ones costs."""
        ages = np.arange(1, stop - start)
        return float(np.sum(self.rates[start + 1 : stop] * ages**self.growth))

    @cached_property
    def _gaps(self) -> np.ndarray:
        table = np.full((STEPS, STEPS + 1), np.inf)
        for start in range(STEPS):
            for stop in range(start + 1, STEPS + 1):
                table[start, stop] = self._gap(start, stop)
        return table

    def _shortest(self, budget: int, limit: float = math.inf) -> tuple[float, list[int]]:
        """Return the least cost of a mask with so many computed steps, and the mask.

        Gaps that begin early and cost more than the limit are not allowed.
        """
        gaps = self._gaps.copy()
        gaps[:_EARLY][gaps[:_EARLY] > limit] = np.inf
        best = np.full(STEPS, np.inf)
        best[0] = 0.0
        origins = []
        for _ in range(budget - 1):
            through = best[:, None] + gaps[:, :STEPS]
            origins.append(through.argmin(axis=0))
            best = through.min(axis=0)
        total = best + gaps[:, STEPS]
        last = int(total.argmin())
        if not np.isfinite(total[last]):
            return math.inf, []
        chosen = [last]
        for origin in reversed(origins):
            chosen.append(int(origin[chosen[-1]]))
        return float(total[last]), chosen[::-1]

    def _cost(self, chosen: Sequence[int]) -> float:
        return sum(
            float(self._gaps[a, b]) for a, b in zip(chosen, [*chosen[1:], STEPS], strict=True)
        )

    def _early_gap(self, chosen: Sequence[int]) -> float:
        stops = [*chosen[1:], STEPS]
        return max(
            float(self._gaps[a, b]) for a, b in zip(chosen, stops, strict=True) if a < _EARLY
        )

    def _db(self, error: float) -> float:
        return min(self.offset_db - 10.0 * math.log10(max(error, 1e-12)), _CAP_DB)

    def _fallen_db(self, chosen: Sequence[int], at: np.ndarray | None = None) -> np.ndarray:
        """Return what prompts lose that fall; `at` is where each does, by default all quantiles."""
        where = stats.norm.ppf((np.arange(200) + 0.5) / 200) if at is None else at
        longest = self._early_gap(chosen)
        if self.kind not in _CLIFF_SPREAD or longest <= 0.0:
            return np.zeros_like(where)
        past = math.log(longest / self.edge) - _CLIFF_SPREAD[self.kind] * where
        lost: np.ndarray = _CLIFF_DB * stats.norm.cdf(past / _CLIFF_WIDTH)
        return lost

    def _levels(self, cache: CachePolicy, mask: Sequence[Action]) -> np.ndarray:
        """Return the mean PSNR of prompts, by where they fall."""
        chosen = _computed(mask)
        return self._db(self._cost(chosen) * self._lost(cache.payload)) - self._fallen_db(chosen)

    def _worst(self, levels: np.ndarray) -> float:
        """Return what the worst of some unseen prompts exceeds with the promised probability."""
        share = 1.0 - _PROMISED ** (1.0 / _UNSEEN)
        spread = math.hypot(_PROMPT_SD, _OWN_SD)
        low, high = float(levels.min()) - 8.0 * spread, float(levels.max())
        for _ in range(60):
            middle = (low + high) / 2.0
            below = float(stats.norm.cdf((middle - levels) / spread).mean())
            low, high = (middle, high) if below < share else (low, middle)
        return low

    def _lost(self, payload: Payload) -> float:
        axis = "arc_length" if payload.arc_length is not None or payload.order == 0 else "step"
        names = (f"order {payload.order}", payload.form, axis)
        return float(10.0 ** (sum(self.payload_db[name] for name in names) / 10.0))

    # --- what a run shows --------------------------------------------------------------------

    def executed(self, cache: CachePolicy, case: Case) -> list[Action]:
        """Return what a policy does at each step of a case."""
        trigger = trigger_for(cache, STEPS, {"step", "cfg", "block"})
        pace = self._shown / self._shown.mean() * math.exp(0.15 * _draw(self.seed, "pace", case))
        done: list[Action] = []
        last = 0
        for step in range(STEPS):
            change = float(pace[step]) * 0.08
            if not isinstance(cache, MaskCache) and not cache.accumulated:
                change *= max(step - last, 1)
            done.append(trigger.decide(step, change))
            if done[-1] == "full":
                deviation = 0.08 * float(pace[last + 1 : step + 1].sum())
                distances: dict[Granularity, float] = {
                    "step": change,
                    "cfg": 1.5 * change,
                    "block": 1.2 * change,
                }
                seen = Measured(
                    deviation if getattr(cache, "indicator", 1) is None else None, distances
                )
                trigger.observe(step, seen if step else None)
                last = step
        return done

    def share_of(self, cache: CachePolicy | None, mask: Sequence[Action]) -> float:
        """Return the share of the plain call's time."""
        blocks = 0.0 if cache is None else min((cache.fn_blocks + cache.bn_blocks) / 10, 1.0)
        costs = {"full": 1.0, "step": _REUSED, "cfg": 0.5, "block": max(blocks, _REUSED)}
        return _REST + (1.0 - _REST) * sum(costs[action] for action in mask) / STEPS

    def psnr(self, policy: Policy, case: Case) -> float:
        """Return the PSNR of one video."""
        cache = policy.cache
        if cache is None:
            return _CAP_DB
        chosen = _computed(self.executed(cache, case))
        at = np.array([_draw(self.seed, "cliff", case)])
        level = self._db(self._cost(chosen) * self._lost(cache.payload))
        own = _OWN_SD * _draw(self.seed, policy.id, case)
        prompt = _PROMPT_SD * _draw(self.seed, "prompt", case)
        return min(level - float(self._fallen_db(chosen, at)[0]) + prompt + own, _CAP_DB)


class Simulated:
    """What `tuner.evaluate.Evaluator` is to a pipeline; counts the forwards that it would run."""

    def __init__(self, landscape: Landscape, seed: int) -> None:
        """Measure a landscape; the seed is that of the latencies."""
        self.constraints = parse_constraints(FLOORS)
        self.device = torch.device("cpu")
        self.forwards = 0
        self._landscape = landscape
        self._random = np.random.default_rng(seed)
        self._known: set[Case] = set()

    @property
    def videos(self) -> float:
        """The same in plain videos."""
        return self.forwards / STEPS

    def knows(self, case: Case) -> bool:
        """Whether the plain video of a case was generated already."""
        return case in self._known

    def plain_values(self, case: Case) -> dict[str, float]:
        """Return what the plain video gives against itself."""
        self._plain(case)
        return {"psnr": _CAP_DB}

    def measure(self, policy: Policy, case: Case, *, paired: bool) -> Outcome:
        """Run one case, with the plain pipeline beside it if asked."""
        baseline_ms = self._latency(1.0) if paired else None
        if paired:  # that run gives the plain video, too
            self.forwards += STEPS
            self._known.add(case)
        self._plain(case)
        mask: list[Action] = ["full"] * STEPS
        if policy.cache is not None:
            mask = self._landscape.executed(policy.cache, case)
        share = self._landscape.share_of(policy.cache, mask)
        computed = mask.count("full")
        self.forwards += computed
        work = STEPS / sum({"full": 1.0, "step": 0.0, "cfg": 0.5, "block": 0.5}[a] for a in mask)
        summary = Summary(policy.id, "", {}, STEPS, computed, 0, work, 0, 0, ())
        values = {"psnr": self._landscape.psnr(policy, case)}
        return Outcome(case, values, self._latency(share), baseline_ms, summary)

    def run(
        self,
        policy: Policy,
        cases: Sequence[Case],
        *,
        pairs: int,
        stop: Callable[[list[Outcome]], bool] = lambda _: False,
    ) -> Iterator[Outcome]:
        """Measure a policy case by case; `stop` ends it early, the last `pairs` are paired."""
        yield from one_by_one(
            lambda case, paired: self.measure(policy, case, paired=paired), cases, pairs, stop
        )

    def _plain(self, case: Case) -> None:
        self.forwards += 0 if case in self._known else STEPS
        self._known.add(case)

    def _latency(self, share: float) -> float:
        slow = self._random.exponential(0.15) if self._random.random() < _OUTLIERS else 0.0
        return _PLAIN_MS * share * math.exp(self._random.normal(0.0, _LATENCY_SD) + slow)


def _smooth(random: np.random.Generator, sd: float) -> np.ndarray:
    """Return a smooth random curve over the steps."""
    curve = gaussian_filter1d(random.normal(size=STEPS), 3.0, mode="nearest")
    scaled: np.ndarray = sd * curve / curve.std()
    return scaled


def _draw(seed: int, what: str, case: Case) -> float:
    """Return the standard normal number that belongs to a case."""
    text = f"{seed}\n{what}\n{case.prompt}\n{case.seed}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return float(stats.norm.ppf((number + 0.5) / 2.0**64))


def _computed(mask: Sequence[Action]) -> list[int]:
    """Return the full steps; a granularity below the step saves less and helps no more."""
    return [step for step, action in enumerate(mask) if action == "full"]


def _actions(chosen: Sequence[int]) -> list[Action]:
    return ["full" if step in chosen else "step" for step in range(STEPS)]


def _typical(cache: CachePolicy) -> list[Case]:
    """Return the cases that stand for all: what a mask does is the same on each."""
    return [Case("typical", n) for n in range(1 if isinstance(cache, MaskCache) else 40)]
