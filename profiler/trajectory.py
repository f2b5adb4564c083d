"""What a plain generation passes through: guided outputs and latents of every step.

Everything that a forecast by weighted sums can do is decided by the inner products of these
vectors. So a trajectory is kept as its Gram matrix: a hundred numbers squared instead of gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditune.accel.mixcache import BATCHED, COND, UNCOND, guided
from ditune.accel.tap import Observation

_CLEAREST = 1.0 + 1e-6  # noise level of flow matching in pure noise
SAMPLED = 65_536  # values of a latent that are looked at; of more, an even selection


@dataclass(frozen=True)
class Trajectory:
    """One plain generation of n steps.

    Attributes:
        gram: Inner products [2n, 2n] per value: the guided outputs of all steps come first, then
            the latents that went in.
        sigmas: Noise level of every step [n].
    """

    gram: np.ndarray
    sigmas: np.ndarray

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.sigmas)

    @property
    def changes(self) -> np.ndarray:
        """How far the guided output moves from each step to the next [n - 1], by its own size."""
        gram = self.gram[: self.steps, : self.steps]
        size = np.diag(gram)
        squared = size[1:] + size[:-1] - 2.0 * np.diag(gram, 1)
        moved: np.ndarray = np.sqrt(np.maximum(squared, 0.0) / size.mean())
        return moved


class TrajectoryRecorder:
    """Gathers the trajectories of calls; give its `watch` to `accel.tap.tapped`."""

    def __init__(self, guidance_scale: float) -> None:
        """Start empty; the guidance scale joins the branches as the pipeline does."""
        self._scale = guidance_scale
        self._outputs: list[dict[str, Tensor]] = []
        self._latents: list[Tensor] = []
        self._sigmas: list[float | None] = []
        self._step: int | None = None
        self._done: list[Trajectory] = []

    def watch(self, seen: Observation) -> None:
        """Take one forward."""
        if not self._outputs or seen.step != self._step or seen.branch in self._outputs[-1]:
            if seen.step == 0:
                self._close()
            self._step = seen.step
            self._outputs.append({})
            self._latents.append(_sampled(seen.latents, like=_conditional(seen, seen.output)))
            self._sigmas.append(seen.sigma)
        if seen.branch == BATCHED:
            self._outputs[-1][COND] = _sampled(_conditional(seen, seen.output))
            self._outputs[-1][UNCOND] = _sampled(seen.output.chunk(2)[0])
        else:
            self._outputs[-1][seen.branch] = _sampled(seen.output)

    def trajectories(self) -> tuple[Trajectory, ...]:
        """Return the trajectories of the calls seen, without those that cannot be used.

        A call counts if the noise level of every step was known and is one of flow matching (at
        most 1), and outputs are shaped like latents.
        """
        self._close()
        return tuple(self._done)

    def _close(self) -> None:
        outputs, latents, sigmas = self._outputs, self._latents, self._sigmas
        self._outputs, self._latents, self._sigmas = [], [], []
        known = [sigma for sigma in sigmas if sigma is not None]
        if len(outputs) < 2 or len(known) < len(sigmas) or max(known) > _CLEAREST:
            return
        vectors = [*(guided(each, self._scale) for each in outputs), *latents]
        if len({len(vector) for vector in vectors}) > 1:
            return
        rows = torch.stack(vectors).double()
        gram = rows @ rows.T / rows.shape[1]
        self._done.append(Trajectory(gram.numpy(), np.asarray(known)))


def _conditional(seen: Observation, values: Tensor) -> Tensor:
    """Return the half of a batch that has the prompt, all of it where branches run apart."""
    return values.chunk(2)[1] if seen.branch == BATCHED else values


def _sampled(values: Tensor, like: Tensor | None = None) -> Tensor:
    """Return an even selection of values; of inputs only the part that the output is about."""
    part = values if like is None else values[tuple(slice(size) for size in like.shape)]
    flat = part.flatten()
    every = max(1, len(flat) // SAMPLED)
    return flat[::every].to("cpu", torch.float32)
