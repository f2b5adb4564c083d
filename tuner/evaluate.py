"""Evaluate a policy: the quality of its videos and its speed against the plain pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
import torch

from ditune.accel.anatomy import denoisers
from ditune.accel.apply import Summary, accelerate
from ditune.db.policy import Policy
from ditune.db.records import Constraint
from ditune.profiler.timing import timed
from ditune.tuner.quality import values_of
from ditune.tuner.source import Source


@dataclass(frozen=True)
class Case:
    """One video to generate: a prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What one case gave.

    `baseline_ms` is None where the plain pipeline was not run beside it; `earlier_ms` is how long
    that took when its video was made for reference, None where it was not timed.
    """

    case: Case
    values: dict[str, float]
    tuned_ms: float
    baseline_ms: float | None
    summary: Summary
    earlier_ms: float | None = None


class Evaluates(Protocol):
    """What a search and a proof need of an evaluator."""

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """What is scored."""

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""

    @property
    def videos(self) -> float:
        """How many plain videos' worth of compute all of it took so far."""

    def knows(self, case: Case) -> bool:
        """Whether the plain video of a case was generated already."""

    def plain_values(self, case: Case) -> dict[str, float]:
        """Return what each metric gives the plain video against itself."""

    def measure(self, policy: Policy, case: Case, *, paired: bool) -> Outcome:
        """Generate one case under a policy and compare it with the plain video."""

    def run(
        self,
        policy: Policy,
        cases: Sequence[Case],
        *,
        pairs: int,
        stop: Callable[[list[Outcome]], bool] = ...,
    ) -> Iterator[Outcome]:
        """Measure a policy case by case."""


@dataclass
class _Computed:
    """How many plain videos' worth of compute evaluators took that share them."""

    videos: float = 0.0


class Evaluator:
    """Runs a source's pipeline plain and tuned; plain videos are generated once and kept."""

    def __init__(
        self,
        source: Source,
        constraints: Sequence[Constraint],
        plain: Evaluator | None = None,
        worth: float = 1.0,
    ) -> None:
        """Prepare to measure a source; nothing runs yet.

        Args:
            source: The pipeline and its arguments.
            constraints: What is scored.
            plain: Compare with what this evaluator calls plain, instead of the source itself. Its
                `videos` then count what both take.
            worth: Of a call without a policy, in what `plain` calls plain.
        """
        self.source = source
        self.constraints = tuple(constraints)
        self.device = next(denoisers(source.pipe)[0].parameters()).device
        self._plain: dict[Case, np.ndarray] = {}
        self._plain_ms: dict[Case, float] = {}
        self._plain_scores: defaultdict[Case, dict[str, float]] = defaultdict(dict)
        self._flip = False
        self._reference = plain or self
        self._worth = worth
        self._computed = _Computed()

    @property
    def videos(self) -> float:
        """Plain ones' worth of compute so far, that under other floors included."""
        return self._computed.videos

    @videos.setter
    def videos(self, videos: float) -> None:
        self._computed.videos = videos

    def under(self, constraints: Sequence[Constraint]) -> Self:
        """Return an evaluator of the same source under other floors; plain videos are shared."""
        other = copy(self)
        other.constraints = tuple(constraints)
        return other

    def plain(self, case: Case) -> np.ndarray:
        """Return the plain video of a case, [frames, height, width, 3] in [0, 1]."""
        if case not in self._plain:
            self._plain[case], self._plain_ms[case] = self._generated(case)
        return self._plain[case]

    def adopt(self, case: Case, output: Any) -> None:
        """Take what the plain pipeline returned for a case elsewhere, with numpy output."""
        self._plain.setdefault(case, video_of(output))

    def known(self) -> dict[Case, np.ndarray]:
        """Return the plain videos that were generated or adopted so far."""
        return dict(self._plain)

    def know(self, videos: Mapping[Case, np.ndarray]) -> None:
        """Take plain videos that another evaluator of the same source knows."""
        self._plain.update(videos)

    def knows(self, case: Case) -> bool:
        """Whether the plain video of a case was generated already."""
        return case in self._plain

    def plain_values(self, case: Case) -> dict[str, float]:
        """Return what each metric gives the plain video against itself."""
        return self.values(self.plain(case), case)

    def values(self, video: np.ndarray, case: Case) -> dict[str, float]:
        """Return what each metric gives a video against the plain one of its case."""
        reference = self._reference
        plain = reference.plain(case)
        known = reference._plain_scores[case]
        return values_of(self.constraints, video, plain, case.prompt, known)

    def tuned(self, policy: Policy, case: Case) -> tuple[np.ndarray, float, Summary]:
        """Return the video under a policy, its latency in milliseconds, and what the policy did."""
        with accelerate(self.source.pipe, policy, small=self.source.small) as applied:
            video, lasted = self.generate(case)
            summary = applied.summary()
        self._reference.videos += self._worth * summary.work_share
        return video, lasted, summary

    def measure(self, policy: Policy, case: Case, *, paired: bool) -> Outcome:
        """Generate one case under a policy and compare it with the plain video.

        With `paired` the plain pipeline runs beside it, first and second in turn.
        """
        baseline_ms: float | None = None
        self._flip = not self._flip
        if paired and self._flip:
            baseline_ms = self._reference.baseline_ms(case)
        video, tuned_ms, summary = self.tuned(policy, case)
        if paired and not self._flip:
            baseline_ms = self._reference.baseline_ms(case)
        values = self.values(video, case)
        earlier_ms = self._reference._plain_ms.get(case)
        return Outcome(case, values, tuned_ms, baseline_ms, summary, earlier_ms)

    def run(
        self,
        policy: Policy,
        cases: Sequence[Case],
        *,
        pairs: int,
        stop: Callable[[list[Outcome]], bool] = lambda _: False,
    ) -> Iterator[Outcome]:
        """Measure a policy case by case; `stop` ends it early.

        The last `pairs` are paired: a policy that is given up before costs no plain run.
        """
        yield from one_by_one(
            lambda case, paired: self.measure(policy, case, paired=paired), cases, pairs, stop
        )

    def baseline_ms(self, case: Case) -> float:
        """Run the plain pipeline once more and return its latency."""
        video, lasted = self._generated(case)
        self._plain.setdefault(case, video)
        return lasted

    def _generated(self, case: Case) -> tuple[np.ndarray, float]:
        """Call the plain pipeline and count it."""
        self._reference.videos += self._worth
        return self.generate(case)

    def generate(
        self, case: Case, changes: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[np.ndarray, float]:
        """Call the pipeline as it stands; return the video and the latency in milliseconds.

        `changes` are arguments that take the place of the source's own.
        """
        generator = torch.Generator().manual_seed(case.seed)

        def call() -> Any:
            arguments = {**self.source.call, **changes}
            return self.source.pipe(
                prompt=case.prompt, generator=generator, output_type="np", **arguments
            )

        output, lasted = timed(call, self.device)
        return video_of(output), lasted


def one_by_one(
    measure: Callable[[Case, bool], Outcome],
    cases: Sequence[Case],
    pairs: int,
    stop: Callable[[list[Outcome]], bool],
) -> Iterator[Outcome]:
    """Measure cases until `stop` says so; the last `pairs` of them are paired."""
    outcomes: list[Outcome] = []
    for index, case in enumerate(cases):
        outcomes.append(measure(case, index >= len(cases) - pairs))
        yield outcomes[-1]
        if stop(outcomes):
            return


def video_of(output: Any) -> np.ndarray:
    """Return the video that a pipeline returned, [frames, height, width, 3] in [0, 1]."""
    frames = output.frames if hasattr(output, "frames") else output.images[:, None]
    return np.asarray(frames[0], dtype=np.float32)


def cases_of(prompts: Sequence[str], count: int, seed: int) -> list[Case]:
    """Return `count` cases: prompts in order, each with a seed of its own counted from `seed`."""
    return [Case(prompts[index % len(prompts)], seed + index) for index in range(count)]
