"""What to leave out of a pipeline's work: caches with a list or a rule, and the hand-off."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ditune.db.digest import digest
from ditune.db.record import Count, Fraction, Record

Granularity = Literal["step", "cfg", "block"]
Action = Literal["full", "step", "cfg", "block"]
Form = Literal["hidden", "latent", "output"]
Indicator = Literal["latent", "spectral", "timestep", "first_block"]


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(after <= before for before, after in pairwise(values)):
        raise ValueError("an arc length grows from step to step")
    return values


ArcLength = Annotated[
    tuple[float, ...], Field(min_length=2, max_length=1000), AfterValidator(_rising)
]


class Payload(Record):
    """What stands in for a forward that is left out.

    `hidden` adds the residual of the whole block stack to this step's embedding, `latent` what the
    model adds to its input (EasyCache's form), `output` predicts the model's output. `order` 0
    reuses the last computed value, 1 extrapolates in a line through the last two, 2 in a parabola
    through three. They run over the steps' numbers, or over `arc_length`: how far the output has
    travelled at each step of the plain pipeline. `fft_delta` amplifies the cached difference of the
    branches by a tenth, the low frequencies in the first four fifths of the steps, the high ones in
    the last two (FasterCache).
    """

    form: Form = "output"
    order: Annotated[int, Field(ge=0, le=2)] = 1
    cfg_form: Literal["delta", "fft_delta"] = "delta"
    arc_length: ArcLength | None = None


class MaskCache(Record):
    """MixCache with an explicit action per step: no host synchronisation, fixed latency."""

    kind: Literal["mask"] = "mask"
    actions: Annotated[tuple[Action, ...], Field(min_length=1, max_length=1000)]
    payload: Payload = Payload()
    fn_blocks: Count = 1  # blocks at the front that a block-cached step still runs
    bn_blocks: Count = 0  # and at the back

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.actions[0] != "full":
            raise ValueError("the first step must be full: there is nothing to reuse yet")
        arc = self.payload.arc_length
        if arc is not None and len(arc) != len(self.actions):
            raise ValueError(f"{len(self.actions)} actions and an arc length of {len(arc)} steps")
        return self


class RuleCache(Record):
    """MixCache with its context-aware trigger; see `accel/trigger.py` for what each number does."""

    kind: Literal["rule"] = "rule"
    warmup_frac: Fraction = 0.2
    cooldown_steps: Annotated[int, Field(ge=0, le=10)] = 1
    interval_init: Annotated[int, Field(ge=2, le=8)] = 2
    interval_max: Annotated[int, Field(ge=2, le=8)] = 6
    delta2: Annotated[float, Field(gt=0, le=10)] = 0.1
    delta1_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.4
    repeat_penalty: Annotated[float, Field(ge=1, le=100)] = 5.0
    impact_step: Annotated[float, Field(gt=0, le=1000)] = 1.0
    impact_cfg: Annotated[float, Field(gt=0, le=1000)] = 1.0
    impact_block: Annotated[float, Field(gt=0, le=1000)] = 1.0
    allowed: Annotated[tuple[Granularity, ...], Field(min_length=1)] = ("step", "cfg", "block")
    payload: Payload = Payload()
    fn_blocks: Count = 1
    bn_blocks: Count = 0
    indicator: Indicator | None = None  # None: MixCache's own intervals
    threshold: Annotated[float, Field(gt=0, le=100)] = 0.25  # change at which a step is computed
    accumulated: bool = True  # added up step by step; False: against the last full step
    reuse_max: Fraction = 0.9  # of the steps; more is a runaway and ends caching for the call

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """What a reused step may be: a forward whose front blocks have run is no whole step."""
        within = self.indicator == "first_block"
        return tuple(g for g in self.allowed if not (within and g == "step"))

    @model_validator(mode="after")
    def _first_block_runs(self) -> Self:
        if self.indicator == "first_block" and (self.fn_blocks < 1 or "block" not in self.allowed):
            raise ValueError(
                "the first_block indicator looks at blocks that run: it needs fn_blocks of 1 or "
                'more and "block" among the allowed granularities'
            )
        return self


CachePolicy = Annotated[MaskCache | RuleCache, Field(discriminator="kind")]


MAX_SIGMA = 1000
Sigma = Annotated[float, Field(gt=0, le=MAX_SIGMA)]  # a noise level, in the scheduler's own unit


class Handoff(Record):
    """SRDiffusion with a fixed switch: the large model down to `sigma`, the small one below it.

    Below `until` the large model comes back: the two disagree more again at the end.
    """

    mode: Literal["static"] = "static"
    sigma: Sigma
    until: Sigma | None = None

    def takes(self, sigma: float) -> bool:
        """Whether the small model runs at a noise level."""
        return (self.until or 0.0) <= sigma < self.sigma

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.until is not None and self.until >= self.sigma:
            raise ValueError("the large model comes back below the switch: until < sigma")
        return self


class BandedHandoff(Record):
    """The small model runs within bands of noise levels, [upper, lower), in falling order."""

    mode: Literal["bands"] = "bands"
    bands: Annotated[
        tuple[tuple[Sigma, Annotated[float, Field(ge=0)]], ...], Field(min_length=1, max_length=500)
    ]

    def takes(self, sigma: float) -> bool:
        """Whether the small model runs at a noise level."""
        return any(lower <= sigma < upper for upper, lower in self.bands)

    @model_validator(mode="after")
    def _fall(self) -> Self:
        edges = [edge for band in self.bands for edge in band]
        apart = all(upper > lower for upper, lower in self.bands)
        if not apart or any(after > before for before, after in pairwise(edges)):
            raise ValueError("bands of noise levels are [upper, lower), in falling order and apart")
        return self


class AdaptiveHandoff(Record):
    """SRDiffusion's own switch: once a signal's change per step has nearly stopped falling.

    The change is tanh of the relative L1 distance. The small model takes over for good after the
    first step, from `min_frac` of the steps on, at which the change fell by less than `delta`, and
    after `max_frac` of them in any case. Which signal the paper means is not known; of the
    candidates only the denoised estimate makes `delta` act alike on flow and diffusion models.
    """

    mode: Literal["adaptive"] = "adaptive"
    signal: Literal["denoised", "latent", "output"] = "denoised"
    delta: Annotated[float, Field(gt=0, le=1)] = 0.01
    min_frac: Fraction = 0.1
    max_frac: Fraction = 0.6
    until: Sigma | None = None

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.min_frac > self.max_frac:
            raise ValueError("the latest switch lies before the earliest: min_frac <= max_frac")
        return self


HandoffPolicy = Annotated[Handoff | BandedHandoff | AdaptiveHandoff, Field(discriminator="mode")]


class Policy(Record):
    """What to leave out of a pipeline's work; empty means the plain pipeline."""

    cache: CachePolicy | None = None
    handoff: HandoffPolicy | None = None

    @property
    def id(self) -> str:
        """The content address of the policy."""
        return _digest(self)


@lru_cache(maxsize=10_000)
def _digest(policy: Policy) -> str:
    """Return the digest of a policy; a search compares each with all others, again and again.

    Kept beside the records, not in them: there it would travel along with `model_copy`.
    """
    return digest(policy)
