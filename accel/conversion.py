"""Ask a diffusion model in the terms of another one, trained on another schedule and latent scale.

CogVideoX 5B and 2B see the same videos, but scale their latents differently and noise them by
different schedules. A latent of the large one is given to the small one at the timestep at which
the small one knows the same ratio of signal to noise, and what it says is put back. All of it is
linear in the model's output, so that guidance may join the branches before or after.
Source: our algebra, from the definition of v-prediction; nobody published how it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """What a model with v-prediction was trained on.

    Attributes:
        alphas_cumprod: Share of the signal's variance at every training timestep, falling.
        scaling_factor: What the VAE's latents were multiplied by.
    """

    alphas_cumprod: Sequence[float]
    scaling_factor: float


class Conversion:
    """The way from one model's terms into another's and back, for every training timestep."""

    def __init__(self, large: NoiseSchedule, small: NoiseSchedule) -> None:
        """Work out the coefficients; x_l and v_l are in the large model's terms, x_s and v_s not.

        With `z` the unscaled latents, `x_l = alpha_l f_l z + sigma_l e` is the same noised video as
        `x_s = alpha_s f_s z + sigma_s e` if `alpha_s f_s / sigma_s = alpha_l f_l / sigma_l`. There
        `x_s = (sigma_s / sigma_l) x_l`, and `v = alpha e - sigma f z` gives the way back.
        """
        alpha_l, sigma_l = _parts(large)
        ratio = large.scaling_factor / small.scaling_factor
        signal = alpha_l / sigma_l * ratio  # of the small one, over its noise
        alpha_s, sigma_s = signal / np.hypot(signal, 1.0), 1.0 / np.hypot(signal, 1.0)
        scale = sigma_s / sigma_l
        known = np.arctan2(*_parts(small)[::-1])
        timesteps = np.interp(np.arctan2(sigma_s, alpha_s), known, np.arange(len(known)))
        keep = scale * (alpha_l * sigma_s - sigma_l * ratio * alpha_s)
        gain = alpha_l * alpha_s + sigma_l * ratio * sigma_s
        self._table = torch.from_numpy(np.stack([timesteps, scale, keep, gain])).float()

    def asked(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the small model is given: latents and timestep.

        Args:
            latents: The large model's input [batch, ...].
            timestep: Its timesteps [batch], whole numbers.
        """
        timesteps, scale, _, _ = self._rows(timestep)
        return (latents.float() * _over(scale, latents)).to(latents.dtype), timesteps

    def answered(self, latents: Tensor, timestep: Tensor, output: Tensor) -> Tensor:
        """Return the large model's velocity that an output of the small one stands for.

        Args:
            latents: The large model's input.
            timestep: Its timesteps.
            output: What the small model said to `asked(latents, timestep)`.
        """
        _, _, keep, gain = self._rows(timestep)
        found = latents.float() * _over(keep, latents) + output.float() * _over(gain, output)
        return found.to(output.dtype)

    def _rows(self, timestep: Tensor) -> Tensor:
        """Return the four coefficients [4, batch]; nothing is read from the device."""
        self._table = self._table.to(timestep.device)
        return self._table[:, timestep.long().reshape(-1)]


def _parts(schedule: NoiseSchedule) -> tuple[np.ndarray, np.ndarray]:
    """Return alpha and sigma at every training timestep."""
    signal = np.asarray(schedule.alphas_cumprod, dtype=np.float64)
    return np.sqrt(signal), np.sqrt(1.0 - signal)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """Return one value for each of a batch, shaped to multiply with it."""
    return values.view(-1, *([1] * (like.ndim - 1)))
