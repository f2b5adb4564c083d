"""The statistics of noisy measurements: paired ratios with intervals, one-sided bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import stats

from ditune.db.errors import UsageFault
from ditune.db.records import Interval

CONFIDENCE = 0.95
_PROMISED = 0.9  # how often the worst of some unseen values holds what was promised
_RESAMPLES = 2000


def paired_speedup(baseline_ms: Sequence[float], tuned_ms: Sequence[float]) -> Interval:
    """Return the median ratio baseline / tuned of interleaved pairs, with its 95 % interval.

    The interval is a percentile bootstrap of the median of log ratios; pairing cancels the drift of
    a shared machine, which comparing two blocks of runs does not.

    Args:
        baseline_ms: Latencies of the plain pipeline, one per pair.
        tuned_ms: Latencies of the tuned one, in the same order.

    Raises:
        UsageFault: The lists are empty or differ in length.
    """
    if len(baseline_ms) != len(tuned_ms) or not baseline_ms:
        raise UsageFault(
            f"a paired speedup needs pairs: got {len(baseline_ms)} and {len(tuned_ms)} latencies"
        )
    ratios = np.log(np.asarray(baseline_ms) / np.asarray(tuned_ms))
    median = float(np.exp(np.median(ratios)))
    if len(ratios) < 3 or np.ptp(ratios) == 0:
        low, high = float(np.exp(ratios.min())), float(np.exp(ratios.max()))
    else:
        found = stats.bootstrap(
            (ratios,),
            np.median,
            n_resamples=_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(np.exp(found.low)), float(np.exp(found.high))
    return Interval(median=median, ci95=(low, high), n=len(ratios))


def mean_lower_bound(values: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound of the mean (Student t); the value itself for one."""
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return float(sample.mean())
    error = sample.std(ddof=1) / np.sqrt(len(sample))
    return float(sample.mean() - stats.t.ppf(confidence, len(sample) - 1) * error)


def counts_lower_bound(differences: Sequence[float], confidence: float = CONFIDENCE) -> float:
    """Return the one-sided lower bound of the mean of paired differences of rights and wrongs.

    Where nothing differs, a spread of zero would claim certainty. As Agresti and Min (2005) do for
    paired proportions, half a video more is taken to have got better, and half a one worse.

    Args:
        differences: One per pair, in [-1, 1].
        confidence: Of the bound.
    """
    sample = np.asarray(differences, dtype=float)
    n = len(sample) + 2
    mean = sample.sum() / n
    variance = (np.square(sample).sum() + 1.0) / n - mean**2
    return float(mean - stats.norm.ppf(confidence) * np.sqrt(variance / n))


def counts_needed(floor: float) -> int:
    """Return how many pairs without any difference prove a floor below zero."""
    return max(1, math.ceil(float(stats.norm.ppf(CONFIDENCE)) / -floor) - 2)


def worst_lower_bound(values: Sequence[float], unseen: int) -> float:
    """Return what the worst of `unseen` further values exceeds nine times in ten.

    A normal tolerance limit: that is so with 95 % confidence, given that values scatter as the
    sample does (Bonferroni over the unseen ones). Never above the worst value seen.

    Args:
        values: The sample, two or more values.
        unseen: How many further values the promise is for.
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        return float(sample.min())
    below = worst_below(len(sample), unseen) * sample.std(ddof=1)
    return float(min(sample.min(), sample.mean() - below))


@cache
def worst_below(count: int, unseen: int) -> float:
    """Return how many standard deviations `worst_lower_bound` of a sample lies below its mean."""
    deep = stats.norm.ppf(1.0 - (1.0 - _PROMISED) / unseen) * np.sqrt(count)
    return float(stats.nct.ppf(CONFIDENCE, count - 1, deep) / np.sqrt(count))


def mean_below(count: int, confidence: float = CONFIDENCE) -> float:
    """Return how many standard deviations `mean_lower_bound` of a sample lies below its mean."""
    return float(stats.t.ppf(confidence, count - 1) / np.sqrt(count))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    p20, p50, p80 = np.percentile(np.asarray(values, dtype=float), [20, 50, 80])
    return float(p20), float(p50), float(p80)
