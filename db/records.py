"""The nouns of ditune: strict, frozen, with units in their names, and nothing else.

Read this file first. A `Profile` says what a pipeline costs and where it repeats itself; a `Policy`
(in `policy.py`) says what to leave out; `Trial`s are policies that were tried; `Evidence` says what
one was proved to give; a `Match` is what a lookup answers.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ditune.db.digest import digest
from ditune.db.policy import Policy
from ditune.db.record import Count, Digest, Name, Positive, Record, Status, Timestamp

SCHEMA_VERSION = 1
Proposer = Literal["baseline", "default", "prior", "warm", "search", "confirmation"]
Location = Annotated[str, StringConstraints(min_length=1, max_length=4096)]  # a folder or hub id

# --- where and with what ---------------------------------------------------------------------


class Hardware(Record):
    """The device that a figure belongs to; its key leaves nothing out that moves a latency."""

    device_name: Name
    kind: Literal["cuda", "cpu"]
    capability: Name  # compute capability ("9.0") or instruction set ("avx512")
    cores: Positive  # streaming multiprocessors, or CPU cores that the process may use
    memory_bytes: Positive
    power_limit_w: float | None = None
    mig_profile: Name | None = None
    driver: Name | None = None
    cuda_runtime: Name | None = None

    @property  # never cached: a cached key would travel along with `model_copy(update=...)`
    def key(self) -> str:
        """The digest that policies are stored under."""
        return digest(self)


class Software(Record):
    """The versions that a figure belongs to."""

    torch: Name
    triton: Name | None
    diffusers: Name
    transformers: Name
    ditune: Name

    @property
    def key(self) -> str:
        """The digest of all versions."""
        return digest(self)


class Workload(Record):
    """What is generated, and with which model: everything a policy depends on but hardware."""

    pipeline_class: Name
    transformer_class: Name
    model_digest: Digest  # of the transformer's configuration
    model_revision: Name | None  # of its weights
    small_model_digest: Digest | None = None
    small_model_revision: Name | None = None
    dtype: Name
    quantisation: Name | None = None
    height: Positive
    width: Positive
    frames: Positive
    steps: Positive
    scheduler_class: Name
    scheduler_shift: float | None
    guidance: bool
    batch: Positive
    attention_backend: Name
    compile_mode: Name | None = None

    @property
    def key(self) -> str:
        """The digest that policies are stored under."""
        return digest(self)


# --- what was measured -----------------------------------------------------------------------


class LayerTiming(Record):
    """How long one layer takes per call, over all calls seen."""

    name: Name
    median_ms: Annotated[float, Field(ge=0)]
    p20_ms: Annotated[float, Field(ge=0)]
    p80_ms: Annotated[float, Field(ge=0)]
    n: Positive


class StepRedundancy(Record):
    """How much one denoising step differs from the one before, mean over prompts.

    All are relative L1 changes, unitless: of the conditional output (step), of the difference
    between the branches relative to the conditional output (cfg), and of the residual of the block
    span (block). The first step has none; cfg is None where there is one branch.
    """

    step: Count
    sigma: float | None
    step_change: float | None
    cfg_change: float | None
    block_change: float | None


class Impacts(Record):
    """How much an error of each granularity matters, the largest 1; see `profiler/impact.py`.

    None where the model has no such granularity. They belong to the model, not to the hardware.
    """

    step: Annotated[float, Field(gt=0, le=1)]
    cfg: Annotated[float, Field(gt=0, le=1)] | None
    block: Annotated[float, Field(gt=0, le=1)] | None


class ForwardBytes(Record):
    """The size of one branch of one forward: what caches hold copies of."""

    output: Count
    hidden: Count  # of everything that flows from block to block
    branches: Positive


class Clocks(Record):
    """Device clocks while timings were taken, and why they were held back."""

    sm_mhz_min: Count
    sm_mhz_median: Count
    sm_mhz_max: Count
    throttle_reasons: tuple[Name, ...]


class Profile(Record):
    """What one pipeline costs on one machine, layer by layer, and where its steps repeat."""

    hardware: Hardware
    software: Software
    workload: Workload
    prompts: Positive
    total_ms: Annotated[float, Field(gt=0)]  # median of one whole call
    layers: tuple[LayerTiming, ...]
    redundancy: tuple[StepRedundancy, ...]
    disagreement: tuple[float, ...] | None  # q_k: small against large model, per step
    peak_bytes: Count | None
    clocks: Clocks | None
    impacts: Impacts | None = None
    forward_bytes: ForwardBytes | None = None
    status: Status = "measured"


# --- what it is worth ------------------------------------------------------------------------


class Constraint(Record):
    """A floor on a quality metric: on the mean over prompts, or on the worst prompt."""

    metric: Name
    statistic: Literal["mean", "worst"]
    floor: float

    @property
    def name(self) -> str:
        """How the constraint is written and reported, "psnr" or "psnr_worst"."""
        return self.metric if self.statistic == "mean" else f"{self.metric}_worst"


class Interval(Record):
    """A median with its 95 % interval over `n` paired measurements."""

    median: float
    ci95: tuple[float, float]
    n: Positive


class Quality(Record):
    """One metric over prompts; `floor` is what the constraint of that name asks for."""

    floor: float | None
    mean: float
    worst: float
    n: Positive


class SearchFigures(Record):
    """What the search saw of a policy on its own few prompts: why it was looked at, never a proof.

    Of a policy that the search never tried it saw nothing.
    """

    trials: Positive  # how many policies were tried
    prompts: Count  # that this one was tried on
    pairs: Count  # of plain and tuned runs, interleaved
    speedup: Annotated[float, Field(gt=0)] | None  # their median, at most what the work allows
    quality: dict[str, Quality]


class Evidence(Record):
    """What a policy was proved to give, where, and how; a number never loses its status."""

    speedup: Interval
    baseline_ms: Annotated[float, Field(gt=0)]
    tuned_ms: Annotated[float, Field(gt=0)]
    quality: dict[str, Quality]
    bound_by: Name  # the constraint with the least room left
    candidates: Positive  # how many were measured in confirmation before this one held
    prompts_digest: Digest
    study: Name
    git_commit: Name | None
    created_at: Timestamp
    status: Status
    search: SearchFigures | None = None  # all others are of the proof


class PolicyFile(Record):
    """A policy with all that is needed to judge and apply it elsewhere: the file format."""

    schema_version: Literal[1] = 1
    policy_id: Digest
    hardware: Hardware
    software: Software
    workload: Workload
    policy: Policy
    evidence: Evidence


class Match(Record):
    """What a lookup found: a policy, or the baseline, and the reason in one sentence."""

    kind: Literal["exact", "compatible", "baseline"]
    reason: str
    policy_id: Digest | None = None
    policy: Policy | None = None
    evidence: Evidence | None = None


# --- how it was found ------------------------------------------------------------------------


class Settings(Record):
    """Everything that makes two searches the same search."""

    hardware: Hardware
    software: Software
    workload: Workload
    constraints: tuple[Constraint, ...]
    prompts_digest: Digest
    seed: int
    space: Digest  # of the search space's description

    @property
    def study(self) -> str:
        """The study's name: a digest of all settings, shortened."""
        return "study-" + digest(self).removeprefix("sha256:")[:16]


class Study(Record):
    """A search, its settings, and the command-line arguments that resume it."""

    name: Name
    settings: Settings
    created_at: Timestamp
    arguments: dict[str, str] = Field(default_factory=dict)
    tier: Name | None = None  # which of a run's trade-offs; None where it has one only


class Score(Record):
    """What each metric gave one video; the seed names it among those of a search."""

    seed: int
    values: dict[str, float]


class Trial(Record):
    """One policy that was tried: what it cost, what it gave, and why it was rejected."""

    uuid: Name
    study: Name
    number: Count
    source: Proposer
    policy: Policy
    state: Literal["complete", "rejected", "failed"]
    speedup: Annotated[float, Field(gt=0)] | None  # median of interleaved pairs, see `pairs`
    pairs: Count | None = None  # 0: the speedup is what the study's other trials let expect
    work_ratio: Annotated[float, Field(gt=0)] | None  # full compute / what ran, in block calls
    quality: dict[str, Quality]
    scores: tuple[Score, ...] = ()  # of each video, in the order they were made
    violation: dict[str, float]  # per constraint; <= 0 holds it
    reason: str | None
    duration_s: Annotated[float, Field(ge=0)]
    created_at: Timestamp
    videos: Annotated[float, Field(ge=0)] | None = None  # plain ones' worth of compute that it took
    peak_bytes: Count | None = None  # of one video, where a curve weighs memory
    energy_j: Annotated[float, Field(ge=0)] | None = None  # the same of energy

    @property
    def feasible(self) -> bool:
        """Whether the trial ran to its end and holds every constraint."""
        held = all(value <= 0 for value in self.violation.values())
        return self.state == "complete" and bool(self.violation) and held


class Origin(Record):
    """Where another process loads a pipeline from: a registered name, or a folder or hub id."""

    registered: Name | None = None
    model: Location | None = None
    revision: Name | None = None
    small_model: Location | None = None
    call: dict[str, int | float | str] = Field(default_factory=dict)  # besides prompt and generator


class Expectation(Record):
    """By how much a metric usually differs between the videos of a job, whatever the policy.

    In decibels where the metric has a level in them, else in its own unit.
    """

    differences: tuple[float, ...]  # of each video from their mean, in the order of the job
    sd: Annotated[float, Field(gt=0)]  # of what a further policy gives one video beside that
    freedom: Positive  # degrees of freedom that this rests on


class Job(Record):
    """One evaluation that was asked for: everything that a process elsewhere needs to do it.

    Its `uuid` and `number` become those of the trial. Without an `origin` the pipeline lives in the
    process that asks, and no other can do the job.
    """

    uuid: Name
    study: Name
    number: Count
    source: Proposer
    policy: Policy
    constraints: tuple[Constraint, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    pairs: Count  # how many of the last cases the plain pipeline runs beside
    expected_speedup: Annotated[float, Field(gt=0)] | None = None  # where there are no pairs
    limit_s: Annotated[float, Field(gt=0)] | None = None  # what takes longer hangs
    origin: Origin | None = None
    expected: dict[str, Expectation] = Field(default_factory=dict)  # by metric, once it is known
    faster_than: Annotated[float, Field(gt=0)] | None = None  # a speedup; less is of no use

    @model_validator(mode="after")
    def _one_seed_per_prompt(self) -> Self:
        if len(self.prompts) != len(self.seeds):
            raise ValueError(f"{len(self.prompts)} prompts need as many seeds")
        return self


class Artifact(Record):
    """A file kept beside the database under its content address."""

    sha256: Digest
    media_type: Name
    byte_count: Count
