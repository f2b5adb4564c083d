"""The search space: numbers that the sampler proposes, and the policy that they spell.

Every point is valid. All numbers are always proposed, so that the sampler sees one space without
branches; those that a kind of policy does not use are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ditune.db.digest import digest_bytes
from ditune.db.policy import (
    AdaptiveHandoff,
    HandoffPolicy,
    Indicator,
    MaskCache,
    Payload,
    Policy,
    RuleCache,
)
from ditune.db.records import LayerTiming, Profile, Trial
from ditune.profiler.trajectory import Trajectory
from ditune.tuner.handoffs import edge, ranked, small_steps, switched
from ditune.tuner.masks import arc_length, densities, mask, place
from ditune.tuner.pace import Pace
from ditune.tuner.schedule import StepSchedules, arc_length_of

Parameters = Mapping[str, float | int | str]
_COMPUTE_MIN = 0.05  # as a fraction of the steps
_BLOCK = re.compile(r"transformer\.\w+\.\d+$")  # how a profile names the blocks of the denoiser
_BESIDE = re.compile(r"transformer\.\w+$")  # and its embeddings and its head
EARLY = (5.0, 2.0, 12.0)  # what masks try in turn: how much more an early error counts
_INTERVALS = "intervals"  # no indicator: MixCache's own trigger
_ARC_LENGTH, _STEP = "arc_length", "step"  # what forecasts run over
_NONE, _STATIC, _RANKED, _ADAPTIVE = "none", "static", "ranked", "adaptive"  # hand-offs
_TAIL_MOST = 5  # steps


@dataclass(frozen=True)
class Proposal:
    """A starting point: parameters, and where they come from.

    `policy` is what to try where the parameters only come close to it.
    """

    source: Literal["baseline", "default", "prior", "warm"]
    parameters: dict[str, float | int | str]
    policy: Policy | None = None


class Space:
    """What may be searched on one workload, given its profile."""

    def __init__(
        self, profile: Profile, *, handoff: bool, trajectories: Sequence[Trajectory] = ()
    ) -> None:
        """Fix the space.

        Args:
            profile: Gives step count, guidance, block count and the density of change.
            handoff: Whether a small model may take over.
            trajectories: Plain generations that masks are scheduled with.
        """
        self.steps = profile.workload.steps
        self.guidance = profile.workload.guidance
        self.depth = sum(bool(_BLOCK.match(layer.name)) for layer in profile.layers) or 1
        self._outside_blocks = _outside(profile.layers)
        self._density = densities(profile.redundancy, self.steps)
        self.disagreement = profile.disagreement if handoff else None
        known = [step.sigma for step in profile.redundancy if step.sigma is not None]
        self.sigmas = known if len(known) == self.steps else []
        self.hands_over = handoff and len(self.sigmas) > 1
        self._typical_change = _typical(profile)
        found = profile.impacts
        self.impacts = {
            f"impact_{name}": value
            for name, value in (found.model_dump() if found is not None else {}).items()
            if value is not None
        }
        fitting = [t for t in trajectories if t.steps == self.steps]
        self.arc_length = arc_length_of(fitting) if fitting else arc_length(self._density[1:])
        self.schedules = StepSchedules(fitting, self.arc_length) if fitting else None
        self.distributions = {**self._common(), **self._depending()}

    @property
    def digest(self) -> str:
        """The digest of names and ranges: two searches over different spaces never mix."""
        text = {k: [type(d).__name__, d._asdict()] for k, d in self.distributions.items()}
        return digest_bytes(json.dumps(text, sort_keys=True, default=str).encode())

    def policy(self, point: Parameters) -> Policy:
        """Return the policy that a point spells."""
        handoff = self._handoff(point)
        cache = self._mask(point, handoff) if point["kind"] == "mask" else self._rule(point)
        if isinstance(cache, MaskCache) and set(cache.actions) == {"full"}:
            return Policy(handoff=handoff)
        return Policy(cache=cache, handoff=handoff)

    def pace(self, trials: Sequence[Trial]) -> Pace:
        """Return how fast policies of this space are by what trials of it measured."""
        return Pace(trials, self.sigmas, self._outside_blocks)

    def baseline(self) -> Proposal:
        """Return the plain pipeline."""
        return Proposal("baseline", self._point(compute_frac=1.0))

    def default(self) -> Proposal:
        """Return MixCache's rule as the paper has it."""
        point = self._point(
            kind="rule", warmup_frac=0.2, order=0, form="hidden", delta2=self._typical_change
        )
        return Proposal("default", point)

    def prior(self, budget: int, early: float = EARLY[0]) -> Proposal:
        """Return the mask that the profile suggests for a number of computed steps."""
        return Proposal("prior", self._point(compute_frac=budget / self.steps, early=early))

    def explicit(self, cache: MaskCache) -> Proposal:
        """Return a mask that its parameters need not spell: they are those that come closest."""
        policy = Policy(cache=cache)
        return Proposal("prior", self._closest(policy), policy)

    def warm(self, policy: Policy) -> Proposal:
        """Return a policy of another search; its parameters are those that come closest."""
        return Proposal("warm", self._closest(policy), policy)

    def handed_over(self, **chosen: float | int | str) -> Proposal:
        """Return a hand-off, static and without a cache unless other numbers are given."""
        neutral: dict[str, float | int | str] = {"handoff": _STATIC, "compute_frac": 1.0}
        return Proposal("prior", self._point(**{**neutral, **chosen}))

    @property
    def fewest(self) -> int:
        """The least number of steps that such a mask computes: its protected ends."""
        ends = self._mask(self._point(compute_frac=0.0), None).actions.count("full")
        return max(ends, math.ceil(_COMPUTE_MIN * self.steps))

    def _common(self) -> dict[str, BaseDistribution]:
        """Return the numbers that every space has."""
        return {
            "kind": CategoricalDistribution(["mask", "rule"]),
            "compute_frac": FloatDistribution(_COMPUTE_MIN, 1.0),
            "warmup_frac": FloatDistribution(0.02, 0.4),
            "cooldown_steps": IntDistribution(0, 3),
            "block_share": FloatDistribution(0.0, 0.6),
            "order": IntDistribution(0, 2),
            "form": CategoricalDistribution(["output", "latent", "hidden"]),
            "fn_blocks": IntDistribution(1, max(1, self.depth // 2)),
            "delta2": FloatDistribution(0.005, 0.5, log=True),
            "delta1_ratio": FloatDistribution(0.2, 0.9),
            "interval_max": IntDistribution(2, 8),
            "indicator": CategoricalDistribution([_INTERVALS, *get_args(Indicator)]),
            "threshold": FloatDistribution(0.01, 2.0, log=True),
        }

    def _depending(self) -> dict[str, BaseDistribution]:
        """Return the numbers that depend on trajectories, guidance and a small model."""
        found: dict[str, BaseDistribution] = {}
        if self.schedules is not None:
            found["early"] = FloatDistribution(0.5, 40.0, log=True)
        else:
            found["density_power"] = FloatDistribution(0.0, 1.5)
        if self.arc_length is not None:
            found["axis"] = CategoricalDistribution([_ARC_LENGTH, _STEP])
        if self.guidance:
            found["cfg_share"] = FloatDistribution(0.0, 0.6)
            found["cfg_form"] = CategoricalDistribution(["delta", "fft_delta"])
        if self.hands_over:
            kinds = [_NONE, _STATIC, _ADAPTIVE]
            kinds += [_RANKED] if self.disagreement is not None else []
            found["handoff"] = CategoricalDistribution(kinds)
            found["handoff_frac"] = FloatDistribution(0.02, 0.98)
            found["head_frac"] = FloatDistribution(0.0, 0.98)
            found["tail_steps"] = IntDistribution(0, _TAIL_MOST)
            found["delta"] = FloatDistribution(0.002, 0.1, log=True)
            found["small_compute_frac"] = FloatDistribution(_COMPUTE_MIN, 1.0)
        return found

    def _point(self, **chosen: float | int | str) -> dict[str, float | int | str]:
        """Return a point with the given numbers and neutral ones elsewhere."""
        neutral: dict[str, float | int | str] = {
            "kind": "mask",
            "compute_frac": 0.5,
            "warmup_frac": 0.1,
            "cooldown_steps": 1,
            "density_power": 0.5,
            "early": EARLY[0],
            "axis": _ARC_LENGTH,
            "block_share": 0.0,
            "cfg_share": 0.0,
            "order": 1,
            "form": "output",
            "fn_blocks": 1,
            "delta2": 0.1,
            "delta1_ratio": 0.4,
            "interval_max": 6,
            "indicator": _INTERVALS,
            "threshold": 0.2,
            "cfg_form": "delta",
            "handoff": _NONE,
            "handoff_frac": 0.2,
            "head_frac": 0.0,
            "tail_steps": 0,
            "delta": 0.01,
            "small_compute_frac": 1.0,
        }
        point = {**neutral, **chosen}
        return {name: point[name] for name in self.distributions}

    def _closest(self, policy: Policy) -> dict[str, float | int | str]:
        """Return the point that comes closest to a policy of as many steps."""
        chosen = self._closest_handoff(policy.handoff)
        cache = policy.cache
        if cache is None:
            return self._within(self._point(**chosen, compute_frac=1.0))
        payload = cache.payload
        chosen |= {
            "order": payload.order,
            "form": payload.form,
            "axis": _STEP if payload.arc_length is None else _ARC_LENGTH,
            "cfg_form": payload.cfg_form,
            "fn_blocks": cache.fn_blocks,
        }
        if isinstance(cache, RuleCache):
            names = ("warmup_frac", "cooldown_steps", "interval_max", "delta2", "delta1_ratio")
            chosen |= {name: getattr(cache, name) for name in (*names, "threshold")}
            chosen |= {"kind": "rule", "indicator": cache.indicator or _INTERVALS}
            return self._within(self._point(**chosen))
        computed = cache.actions.count("full")
        reused = max(self.steps - computed, 1)
        chosen |= {
            "compute_frac": computed / self.steps,
            "block_share": cache.actions.count("block") / reused,
            "cfg_share": cache.actions.count("cfg") / reused,
        }
        return self._within(self._point(**chosen))

    def _closest_handoff(self, handoff: HandoffPolicy | None) -> dict[str, float | int | str]:
        if handoff is None:
            return {}
        if isinstance(handoff, AdaptiveHandoff):
            return {"handoff": _ADAPTIVE, "delta": handoff.delta}
        small = small_steps(handoff, self.sigmas)
        head_steps = next((n for n, step in enumerate(small) if n != step), len(small))
        return {
            "handoff": _STATIC,
            "handoff_frac": 1.0 - len(small) / self.steps,
            "head_frac": head_steps / self.steps,
            "tail_steps": self.steps - 1 - max(small, default=-1),
        }

    def _within(self, point: Mapping[str, float | int | str]) -> dict[str, float | int | str]:
        """Return a point whose numbers lie in their ranges."""
        found = dict(point)
        for name, value in point.items():
            allowed = self.distributions[name]
            if isinstance(allowed, FloatDistribution | IntDistribution):
                found[name] = min(max(float(value), allowed.low), allowed.high)
                if isinstance(allowed, IntDistribution):
                    found[name] = int(found[name])
        return found

    def _mask(self, point: Parameters, handoff: HandoffPolicy | None) -> MaskCache:
        computed = self._computed(point, float(point["compute_frac"]))
        small = set(small_steps(handoff, self.sigmas))
        if small:
            cheap = self._computed(point, float(point["small_compute_frac"]))
            own = [step for step in computed if step not in small]
            fresh = [s for s in range(self.steps) if s == 0 or (s in small) != (s - 1 in small)]
            computed = sorted({*own, *small.intersection(cheap), *fresh})
        cfg_share = float(point.get("cfg_share", 0.0))
        return MaskCache(
            actions=mask(self.steps, computed, cfg_share, float(point["block_share"])),
            payload=self._payload(point),
            fn_blocks=int(point["fn_blocks"]),
        )

    def _computed(self, point: Parameters, share: float) -> list[int]:
        """Return the steps to compute: by trajectories where there are any, else by density."""
        budget = round(share * self.steps)
        if self.schedules is not None:
            return self.schedules.computed(max(budget, 2), float(point["early"]))
        power = float(point["density_power"])
        return place(
            [value**power for value in self._density],
            budget=budget,
            warmup=max(2, math.ceil(float(point["warmup_frac"]) * self.steps)),
            cooldown=int(point["cooldown_steps"]),
        )

    def _rule(self, point: Parameters) -> RuleCache:
        indicators: dict[object, Indicator] = {name: name for name in get_args(Indicator)}
        return RuleCache(
            warmup_frac=float(point["warmup_frac"]),
            cooldown_steps=int(point["cooldown_steps"]),
            interval_max=int(point["interval_max"]),
            delta2=float(point["delta2"]),
            delta1_ratio=float(point["delta1_ratio"]),
            allowed=("step", "cfg", "block") if self.guidance else ("step", "block"),
            payload=self._payload(point),
            fn_blocks=int(point["fn_blocks"]),
            indicator=indicators.get(point["indicator"]),
            threshold=float(point["threshold"]),
            **self.impacts,
        )

    def _payload(self, point: Parameters) -> Payload:
        forms: dict[object, Literal["hidden", "latent"]] = {"hidden": "hidden", "latent": "latent"}
        order = int(point["order"])
        forecasts = order > 0 and point.get("axis") == _ARC_LENGTH
        return Payload(
            form=forms.get(point["form"], "output"),
            order=order,
            cfg_form="fft_delta" if point.get("cfg_form") == "fft_delta" else "delta",
            arc_length=self.arc_length if forecasts else None,
        )

    def _handoff(self, point: Parameters) -> HandoffPolicy | None:
        kind = point.get("handoff", _NONE)
        if kind == _NONE or not self.hands_over:
            return None
        large_steps = round(float(point["handoff_frac"]) * self.steps)
        if kind == _RANKED and self.disagreement is not None:
            return ranked(self.sigmas, self.disagreement, large_steps)
        tail_steps = int(point["tail_steps"])
        if kind == _STATIC:
            head_steps = round(float(point["head_frac"]) * self.steps)
            head_steps = min(head_steps, max(self.steps - large_steps, 0))
            return switched(self.sigmas, large_steps, head_steps=head_steps, tail_steps=tail_steps)
        back = edge(self.sigmas, self.steps - tail_steps) if tail_steps else None
        return AdaptiveHandoff(delta=float(point["delta"]), until=back)


def _outside(layers: Sequence[LayerTiming]) -> float:
    """Return the share of a forward in embeddings and head, 0 where the profile does not say."""
    total_ms = {layer.name: layer.median_ms * layer.n for layer in layers}
    beside_ms = sum(ms for name, ms in total_ms.items() if _BESIDE.match(name))
    return min(beside_ms / total_ms["transformer"], 1.0) if total_ms.get("transformer") else 0.0


def _typical(profile: Profile) -> float:
    """Return the 0.7 quantile of the change per step: where the paper's delta2 starts."""
    known = sorted(s.step_change for s in profile.redundancy if s.step_change is not None)
    if not known:
        return 0.1
    return min(max(known[int(0.7 * (len(known) - 1))], 0.005), 0.5)
