"""Cheap signals from which a trigger tells, before a step is computed, how much it would change.

Each gives one tensor per step; the trigger compares it with the one before. What it costs:

- `latent`: two passes over the latents.
- `spectral`: a Fourier transform of the latents there and back.
- `timestep`: the timestep embedding, a few thousand multiplications; the same for every prompt.
- `first_block`: what the blocks that run anyway add (FirstBlockCache's idea): two passes over the
  hidden state, and the front blocks at every step. It is seen inside the forward: see `spans.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ditune.db.policy import Indicator

_TINY = 1e-6  # of a signal in pure noise
POWER = 3.0  # how steeply the spectrum of clean video falls: SeaCache's value
Measure = Callable[[Tensor, float | None, Tensor | None], Tensor | None]


def indicator_for(kind: Indicator, model: nn.Module) -> Measure | None:
    """Return what measures a step from its latents, noise level and timestep.

    It gives None where it cannot; there is no such measure for what is seen inside the forward.
    """
    if kind == "first_block":
        return None
    if kind == "latent":
        return lambda latents, _sigma, _timestep: latents
    if kind == "spectral":
        return lambda latents, sigma, _timestep: (
            None if sigma is None else clean_part(latents, sigma)
        )
    embed = _timestep_embedding(model)
    return lambda _latents, _sigma, timestep: None if timestep is None else embed(timestep)


def clean_part(latents: Tensor, sigma: float) -> Tensor:
    """Return the latents through the Wiener filter that takes the noise of a step off.

    The clean signal's power is taken to fall with the third power of the frequency, over the last
    two dimensions; noise is white. At high noise only coarse structure is left, so that the change
    from step to step is one of content and not of noise.
    Source: the idea behind SeaCache (arXiv 2602.18993).

    Args:
        latents: [..., height, width] for images and video; tokens [..., tokens, channels] are
            filtered as they are.
        sigma: Noise level of flow matching, 0 to 1; others are mapped to it.
    """
    noise = sigma if sigma <= 1.0 else sigma / (1.0 + sigma)
    height, width = latents.shape[-2:]
    spectrum = torch.fft.rfft2(latents.float()) * _gain(noise, height, width, latents.device)
    clean: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return clean


@lru_cache(maxsize=128)  # the steps of a call or two
def _gain(noise: float, height: int, width: int, device: torch.device) -> Tensor:
    """Return the filter at the frequencies of a real signal; clean video has 1 at the lowest."""
    rows = torch.fft.fftfreq(height, device=device)[:, None]
    columns = torch.fft.rfftfreq(width, device=device)[None, :]
    lowest = 1.0 / max(height, width)
    radius = (rows.square() + columns.square()).sqrt().clamp_min(lowest) / lowest
    prior: Tensor = radius**-POWER
    return prior / (prior + (noise / max(1.0 - noise, _TINY)) ** 2)


def _timestep_embedding(model: nn.Module) -> Callable[[Tensor], Tensor | None]:
    """Return the model's own embedding of a timestep, found by diffusers' classes."""
    waves = next((m for m in model.modules() if isinstance(m, Timesteps)), None)
    embedding = next((m for m in model.modules() if isinstance(m, TimestepEmbedding)), None)
    if waves is None or embedding is None:
        return lambda _: None
    dtype = next(embedding.parameters()).dtype

    def embed(timestep: Tensor) -> Tensor:
        embedded: Tensor = embedding(waves(timestep.flatten()[:1]).to(dtype))
        return embedded

    return embed
