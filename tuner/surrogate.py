"""What a mask will do to quality, from the profile's errors and from the trials so far.

The profile says how far the latents are off after each gap of a mask. How much an error of some
time matters in the end, and what another payload changes, is learnt: a metric in decibels is the
logarithm of a weighted sum of squared errors. The weights, the payloads' effects and the metric's
own level and slope are fitted to the trials as the most probable ones; how certain they are follows
from the curvature there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from ditune.db.policy import Action, MaskCache, Payload
from ditune.tuner.schedule import StepSchedules, gains

_BUMPS = 6  # of the weights' curve over the steps, beside the usual one
_EARLY = 5.0  # the usual curve: see `schedule.gains`
_WEIGHT_SD = 1.0  # of each bump, in log units: a factor of e
_PAYLOADS = {"order 0": (-5.0, 4.0), "order 2": (0.0, 2.0), "latent": (0.0, 2.0)}  # dB: mean, sd
_PAYLOADS |= {"hidden": (0.0, 2.0), "step axis": (-0.5, 2.0)}
_SLOPE_SD = 0.15  # of a metric's decibels per decibel of error
_NOISE_DB = 0.5  # what the model cannot know of one mask on some prompts
_NONE = 1e-7  # squared error that nothing gets below
_TINY = 1e-4  # step of numerical slopes
_POWER_SD = 1.0  # of the number of steps that a gap reuses, with which its error counts more
_LEAN_SD = 1.0  # by how much that power is greater at the beginning, and less at the end
_DRAWS = 4  # fits that are possible, too: their masks are looked at beside the best one's
# places in the vector of unknowns; the bumps and payloads follow
_LEVEL, _SLOPE, _POWER, _LEAN = 0, 1, 2, 3
_BUMP = _LEAN + 1


@dataclass(frozen=True)
class Seen:
    """What a mask gave: a metric in decibels, and by how much that may be off.

    Attributes:
        cache: The mask.
        decibels: Mean over prompts.
        sd: Standard deviation, in decibels.
        elsewhere: Whether the prompts were not those of the search.
    """

    cache: MaskCache
    decibels: float
    sd: float = _NOISE_DB
    elsewhere: bool = False


class Surrogate:
    """A fit to what was seen of one metric; predicts it for masks that nobody ran."""

    def __init__(
        self, schedules: StepSchedules, seen: Sequence[Seen], elsewhere_sd: float = 1.0
    ) -> None:
        """Fit.

        Args:
            schedules: Knows the error of every gap.
            seen: One or more masks.
            elsewhere_sd: By how much other prompts may give more or less than those of the search,
                as a standard deviation in decibels.
        """
        self._schedules = schedules
        self._tables: dict[tuple[Action, ...], np.ndarray] = {}
        self._usual = gains(schedules.steps, _EARLY) ** 2
        self._bumps = _bumps(schedules.steps)
        self._leaning = np.linspace(1.0, -1.0, schedules.steps + 1)
        self._rows = _Rows(
            *map(np.array, zip(*(self._row(s.cache, s.elsewhere) for s in seen), strict=True))
        )
        found, sds = np.array([s.decibels for s in seen]), np.array([s.sd for s in seen])
        mean, sd = _priors(elsewhere_sd)
        start = mean.copy()
        start[_LEVEL] = (found - self._predicted(start, self._rows)).mean()

        def residuals(unknown: np.ndarray) -> np.ndarray:
            own = (self._predicted(unknown, self._rows) - found) / sds
            return np.concatenate([own, (unknown - mean) / sd])

        fit = least_squares(residuals, start)
        self._unknown: np.ndarray = fit.x
        self._covariance: np.ndarray = np.linalg.inv(fit.jac.T @ fit.jac)

    @property
    def weights(self) -> np.ndarray:
        """How much a squared error counts that is made at each step [steps + 1]."""
        return self._weights(self._unknown)

    @property
    def powers(self) -> np.ndarray:
        """With which power of the steps that it reuses a gap counts more than the profile says.

        By where the gap lies [steps + 1]: long gaps may be worse at the beginning than at the end.
        """
        return self._powers(self._unknown)

    def schedules(self) -> list[tuple[int, ...]]:
        """Return the steps to compute that the fit finds best, for every budget.

        After them, for up to half of the steps, those that some other fits would find best: as
        many fits as `_DRAWS`, drawn by how probable they are.
        """
        found = self._schedules.frontier(self.weights, self.powers)
        random = np.random.default_rng(len(self._rows.others))
        for drawn in random.multivariate_normal(self._unknown, self._covariance, size=_DRAWS):
            weights, powers = self._weights(drawn), self._powers(drawn)
            found += self._schedules.frontier(weights, powers, self._schedules.steps // 2)
        return list(dict.fromkeys(found))

    @property
    def elsewhere(self) -> tuple[float, float]:
        """By how much other prompts give more than those of the search, and how sure that is."""
        return float(self._unknown[-1]), float(np.sqrt(self._covariance[-1, -1]))

    def predict(
        self, caches: Sequence[MaskCache], *, elsewhere: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the expected decibels of masks and their standard deviations.

        Args:
            caches: The masks.
            elsewhere: Whether on other prompts than those of the search.
        """
        rows = _Rows(*map(np.array, zip(*(self._row(c, elsewhere) for c in caches), strict=True)))
        values = self._predicted(self._unknown, rows)
        slopes = np.empty((len(caches), len(self._unknown)))
        for place in range(len(self._unknown)):
            moved = self._unknown.copy()
            moved[place] += _TINY
            slopes[:, place] = (self._predicted(moved, rows) - values) / _TINY
        variances = np.einsum("ij,jk,ik->i", slopes, self._covariance, slopes)
        return values, np.sqrt(variances + _NOISE_DB**2)

    def _row(self, cache: MaskCache, elsewhere: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the gaps of a mask, without an error where it has no more, and what else differs.

        There are as many columns as steps; [where, log of reused steps, squared error].
        """
        if cache.actions not in self._tables:  # many masks differ in their payload alone
            computed = [step for step, action in enumerate(cache.actions) if action == "full"]
            gaps = self._schedules.errors(computed)
            table = np.zeros((3, self._schedules.steps))
            table[:, : len(computed)] = gaps.where, np.log(np.maximum(gaps.reused, 1)), gaps.squared
            self._tables[cache.actions] = table
        named = _named(cache.payload)
        others = np.array([*(name in named for name in _PAYLOADS), elsewhere], dtype=float)
        return self._tables[cache.actions], others

    def _predicted(self, unknown: np.ndarray, rows: _Rows) -> np.ndarray:
        where, reused, squared = rows.gaps.swapaxes(0, 1)
        place = where.astype(int)
        weights = self._weights(unknown)[place] * np.exp(self._powers(unknown)[place] * reused)
        errors = (squared * weights).sum(axis=1) + _NONE
        others = rows.others @ unknown[_BUMP + _BUMPS :]
        found: np.ndarray = unknown[_LEVEL] - unknown[_SLOPE] * 10.0 * np.log10(errors) + others
        return found

    def _weights(self, unknown: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._usual * np.exp(unknown[_BUMP : _BUMP + _BUMPS] @ self._bumps)
        return found

    def _powers(self, unknown: np.ndarray) -> np.ndarray:
        found: np.ndarray = unknown[_POWER] + unknown[_LEAN] * self._leaning
        return found


@dataclass(frozen=True)
class _Rows:
    """What is known of some masks before they run: one row each."""

    gaps: np.ndarray  # [masks, 3, steps], see `_row`
    others: np.ndarray  # 1 where it holds: each way to differ in payload, other prompts


def _named(payload: Payload) -> set[str]:
    """Return in what a payload differs from the usual one."""
    named = {f"order {payload.order}", payload.form}
    return named | ({"step axis"} if payload.order and payload.arc_length is None else set())


def _bumps(steps: int) -> np.ndarray:
    """Return overlapping bumps over the steps, 1 high [_BUMPS, steps + 1]."""
    place, centres = np.linspace(0.0, 1.0, steps + 1), np.linspace(0.0, 1.0, _BUMPS)
    found: np.ndarray = np.exp(-0.5 * ((place - centres[:, None]) * (_BUMPS - 1)) ** 2)
    return found


def _priors(elsewhere_sd: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of everything unknown, before any trial."""
    payloads = list(_PAYLOADS.values())
    mean = [0.0, 1.0, 0.0, 0.0, *[0.0] * _BUMPS, *[m for m, _ in payloads], 0.0]
    sd = [
        100.0,
        _SLOPE_SD,
        _POWER_SD,
        _LEAN_SD,
        *[_WEIGHT_SD] * _BUMPS,
        *[s for _, s in payloads],
        elsewhere_sd,
    ]
    return np.array(mean), np.array(sd)
