"""Quality metrics and the floors that bind a search.

Metrics with a reference compare a tuned video with the plain one of the same prompt and seed.
Metrics without one score a video by itself; what is bounded then is the tuned score minus the
plain one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from ditune.db.errors import UsageFault
from ditune.db.records import Constraint, Quality
from ditune.profiler.statistics import (
    CONFIDENCE,
    counts_lower_bound,
    counts_needed,
    mean_lower_bound,
)
from ditune.tuner.clip_score import ClipScore

if TYPE_CHECKING:
    from torch import Tensor

METRIC_GROUP = "ditune.metrics"
PROOF_PROMPTS = 30  # with 20, one policy in thirty that shipped was truly below its floors
UNSEEN = 20  # the worst of so many further prompts should hold its floor too
MARGIN = 0.8  # confidence of the bound that a mean counts with in a search
PSNR_CAP_DB = 100.0  # identical videos have an infinite PSNR, which no file format can hold
_FEWEST_OF_COUNTS, _MOST_OF_COUNTS = 32, 100  # videos of a trial
_FLOOR = re.compile(r"^\s*([a-z][a-z0-9_]*?)(_worst)?\s*>=\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*$")


class Metric(Protocol):
    """Scores one video; more is better.

    Register a class under the entry-point group `ditune.metrics` to add one; it is made once,
    without arguments. Where scores only tell right (1) from wrong (0), give the class `counts =
    True`: a handful of prompts without a difference then proves less than it seems to. Where a
    score says how small an error is, a method `decibels(score)` returns it as a level that grows by
    10 when the squared error falls to a tenth: a search then learns from few trials what masks will
    give. A method `prepare()` is called before anything is generated: what cannot work says so
    there.
    """

    name: str
    needs_reference: bool

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return the score of a video [frames, height, width, 3] in [0, 1]."""


class Psnr:
    """Peak signal-to-noise ratio over all frames together, in dB, capped at 100."""

    name = "psnr"
    needs_reference = True

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return the PSNR against the plain video of the same seed."""
        from torchmetrics.functional.image import peak_signal_noise_ratio

        value = float(peak_signal_noise_ratio(*_tensors(video, reference), data_range=1.0))
        return min(value, PSNR_CAP_DB)

    def decibels(self, score: float) -> float:
        """Return the score: it is one."""
        return score


class Ssim:
    """Structural similarity, mean over frames, in [-1, 1]."""

    name = "ssim"
    needs_reference = True

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return the SSIM against the plain video of the same seed."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        found = structural_similarity_index_measure(*_tensors(video, reference), data_range=1.0)
        assert not isinstance(found, tuple)  # only with return_full_image
        return float(found)

    def decibels(self, score: float) -> float:
        """Return the distance from 1 as a level; for small errors it goes with their square."""
        return min(-10.0 * math.log10(max(1.0 - score, 1e-12)), PSNR_CAP_DB)


def _tensors(video: np.ndarray, reference: np.ndarray | None) -> tuple[Tensor, Tensor]:
    """Return both videos as [frames, 3, height, width]."""
    import torch

    if reference is None or video.shape != reference.shape:
        shape = None if reference is None else reference.shape
        raise UsageFault(
            f"a same-seed metric needs two videos of one shape: got {video.shape} and {shape}"
        )
    pair = [
        np.ascontiguousarray(np.moveaxis(v, -1, 1), dtype=np.float32) for v in (video, reference)
    ]
    return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


@cache
def metrics() -> Mapping[str, Metric]:
    """Return every metric by name: those built in and those that packages register."""
    found: dict[str, Metric] = {"psnr": Psnr(), "ssim": Ssim(), "clip": ClipScore()}
    for entry in entry_points(group=METRIC_GROUP):
        found[entry.name] = entry.load()()
    return found


def parse_constraints(text: str) -> tuple[Constraint, ...]:
    """Return the floors written as "psnr>=35,psnr_worst>=27,judge>=-0.01".

    A bare name bounds the mean over prompts, `_worst` the worst prompt.

    Raises:
        UsageFault: The text is malformed, names an unknown metric, or bounds something twice.
    """
    constraints: list[Constraint] = []
    for part in text.split(","):
        found = _FLOOR.match(part)
        if found is None:
            raise UsageFault(
                f"cannot read the quality floor {part.strip()!r}: write METRIC>=NUMBER, "
                'separated by commas, for example "psnr>=35,psnr_worst>=27"'
            )
        name, worst, floor = found.groups()
        require_metric(name)
        statistic: Literal["mean", "worst"] = "worst" if worst else "mean"
        constraints.append(Constraint(metric=name, statistic=statistic, floor=float(floor)))
    names = [constraint.name for constraint in constraints]
    if len(set(names)) < len(names):
        raise UsageFault(f"--quality bounds the same thing twice: {text}")
    return tuple(constraints)


def require_metric(name: str) -> None:
    """Check that there is a metric of this name.

    Raises:
        UsageFault: There is none.
    """
    if name not in metrics():
        known = ", ".join(sorted(metrics()))
        raise UsageFault(f"unknown metric {name!r}: known are {known}")


def needs_reference(constraints: Iterable[Constraint]) -> bool:
    """Whether any of the constraints compares with the plain video of the same seed."""
    return any(metrics()[c.metric].needs_reference for c in constraints)


def values_of(
    constraints: Iterable[Constraint],
    video: np.ndarray,
    plain: np.ndarray,
    prompt: str,
    plain_scores: dict[str, float] | None = None,
) -> dict[str, float]:
    """Return each constrained metric's value for one video.

    Args:
        constraints: They name the metrics.
        video: The video to judge.
        plain: That of the plain pipeline.
        prompt: Of both.
        plain_scores: What metrics without a reference gave the plain video before; what is missing
            is scored and added.
    """
    known = {} if plain_scores is None else plain_scores
    values = {}
    for name in dict.fromkeys(c.metric for c in constraints):
        metric = metrics()[name]
        if metric.needs_reference:
            values[name] = metric.score(video, plain, prompt)
            continue
        if name not in known:
            known[name] = metric.score(plain, None, prompt)
        values[name] = metric.score(video, None, prompt) - known[name]
    return values


def prepare(constraints: Iterable[Constraint]) -> None:
    """Let metrics load what they need, before anything is generated.

    Raises:
        UsageFault: One of them cannot be used here.
    """
    for name in dict.fromkeys(c.metric for c in constraints):
        getattr(metrics()[name], "prepare", lambda: None)()


def counts(constraint: Constraint) -> bool:
    """Whether a constraint's metric only tells right from wrong."""
    return bool(getattr(metrics()[constraint.metric], "counts", False))


def in_decibels(metric: str) -> Callable[[float], float] | None:
    """Return what turns a metric's scores into decibels, None where they are no such thing."""
    found: Callable[[float], float] | None = getattr(metrics().get(metric), "decibels", None)
    return found


def lower_bound(
    constraint: Constraint, scores: Sequence[float], confidence: float = CONFIDENCE
) -> float:
    """Return the one-sided lower bound of a metric's mean over prompts."""
    if counts(constraint):
        return counts_lower_bound(scores, confidence)
    return mean_lower_bound(scores, confidence)


def cases_needed(constraints: Iterable[Constraint]) -> int:
    """Return how many videos can prove the floors of metrics that count; 0 if there are none.

    Four times what would do if none differed: with as many, a few may.
    """
    floors = [c.floor for c in constraints if counts(c) and c.floor < 0.0]
    return 4 * max(map(counts_needed, floors), default=0)


def cases_to_search(constraints: Iterable[Constraint]) -> int:
    """Return on how many videos to search under floors of metrics that count; 0 if there are none.

    As many as let one video get worse: otherwise a search finds what makes no mistake by chance.
    """
    floors = [c.floor for c in constraints if counts(c)]
    fewest = _FEWEST_OF_COUNTS if floors else 0
    return max([fewest, *(min(math.ceil(-1.0 / f), _MOST_OF_COUNTS) for f in floors if f < 0.0)])


def summarise(
    constraints: Iterable[Constraint], values: Sequence[Mapping[str, float]]
) -> dict[str, Quality]:
    """Return mean and worst per constraint, from the values of each prompt."""
    summary = {}
    for constraint in constraints:
        scores = [value[constraint.metric] for value in values]
        summary[constraint.name] = Quality(
            floor=constraint.floor,
            mean=float(np.mean(scores)),
            worst=float(np.min(scores)),
            n=len(scores),
        )
    return summary


def bound_by(constraints: Iterable[Constraint], quality: Mapping[str, Quality]) -> str:
    """Return the constraint with the least room left, relative to its floor."""

    def room(constraint: Constraint) -> float:
        seen = quality[constraint.name]
        value = seen.mean if constraint.statistic == "mean" else seen.worst
        return (value - constraint.floor) / max(abs(constraint.floor), 1e-3)

    return min(constraints, key=room).name
