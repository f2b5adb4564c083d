"""Clips of moving handwritten digits, rendered from scikit-learn's 1 797 real 8x8 scans.

A caption names digit, colour and motion. It leaves unsaid, as real prompts do: the writing (which
scan), the place, the speed, the size, the two background colours, the direction of their gradient
and a soft spot of light.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from ditune.miniature.language import COLOURS, DIGITS, MOTIONS

FRAMES = 13
SIZE = 32  # pixels, height and width
_HELD_OUT_EVERY = 6  # one scan in six is never used in training
_SPRITE = 32  # pixels of a scan after upsampling


@dataclass(frozen=True)
class Clips:
    """Rendered clips: frames [batch, 3, 13, 32, 32] in [-1, 1], and what each one shows."""

    frames: Tensor
    digit: Tensor
    colour: Tensor
    motion: Tensor


@cache
def sprites(held_out: bool) -> tuple[Tensor, Tensor]:
    """Return scans as masks [n, 1, 32, 32] in [0, 1] and their digits [n].

    Training scans and held-out scans are disjoint (every sixth scan of a digit is held out).
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16.0
    digits = torch.tensor(data.target)
    rank = torch.zeros_like(digits)
    for digit in DIGITS:
        rank[digits == digit] = torch.arange(int((digits == digit).sum()))
    chosen = (rank % _HELD_OUT_EVERY == 0) == held_out
    smooth = functional.interpolate(images[chosen], size=_SPRITE, mode="bicubic")
    return torch.sigmoid((smooth - 0.42) * 12.0), digits[chosen]


def render(count: int, generator: torch.Generator, *, held_out: bool = False) -> Clips:
    """Render random clips; the same generator state gives the same clips on every machine."""
    masks, digits = sprites(held_out)
    scan = torch.randint(len(digits), (count,), generator=generator)
    colour = torch.randint(len(COLOURS), (count,), generator=generator)
    motion = torch.randint(len(MOTIONS), (count,), generator=generator)
    alpha = _moving(masks[scan], motion, generator)
    palette = torch.tensor(list(COLOURS.values()))
    paint = palette[colour] * (0.88 + 0.12 * torch.rand(count, 1, generator=generator))
    background = _background(count, generator)[:, None]
    frames = background + alpha * (paint[:, None, :, None, None] - background)
    return Clips(frames.transpose(1, 2) * 2.0 - 1.0, digits[scan], colour, motion)


def _moving(masks: Tensor, motion: Tensor, generator: torch.Generator) -> Tensor:
    """Return the digit's opacity [batch, frames, 1, size, size] along its path."""
    count = len(masks)
    uniform = torch.rand(count, 5, generator=generator)
    time = torch.linspace(-0.5, 0.5, FRAMES)
    travel = 7.0 + 7.0 * uniform[:, 0]  # pixels over the clip
    direction = torch.tensor([(-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (0, 0)])[motion]
    growth = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, -1.0])[motion]
    size = 14.0 + 5.0 * uniform[:, 1]  # pixels at mid-clip
    log_zoom = growth * (0.7 + 0.4 * uniform[:, 2])
    extent = size[:, None] * torch.exp(log_zoom[:, None] * time)
    room = torch.where(direction == 0, 7.0, 2.0) * torch.where(growth[:, None] == 0, 1.0, 0.6)
    centre = (uniform[:, 3:5] * 2.0 - 1.0) * room
    path = centre[:, None] + direction[:, None] * travel[:, None, None] * time[None, :, None]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2.0
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    pixels = torch.stack([columns, rows], dim=-1)  # x, y
    grid = (pixels - path[:, :, None, None]) * 2.0 / extent[:, :, None, None, None]
    flat = functional.grid_sample(
        masks.repeat_interleave(FRAMES, 0),
        grid.reshape(-1, SIZE, SIZE, 2),
        align_corners=False,
    )
    return flat.reshape(count, FRAMES, 1, SIZE, SIZE)


def _background(count: int, generator: torch.Generator) -> Tensor:
    """Return static scenes [batch, 3, size, size] in [0, 0.55]: a gradient and a soft light."""
    corners = torch.rand(count, 2, 3, generator=generator) * 0.45
    angle = torch.rand(count, 1, 1, generator=generator) * 2.0 * torch.pi
    spot = torch.rand(count, 2, generator=generator) * 2.0 - 1.0
    light = torch.rand(count, 3, generator=generator) * 0.22
    axis = torch.linspace(-1.0, 1.0, SIZE)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    ramp = (torch.cos(angle) * columns + torch.sin(angle) * rows) / 2.8 + 0.5
    far = (columns - spot[:, :1, None]) ** 2 + (rows - spot[:, 1:, None]) ** 2
    glow = torch.exp(-far / 0.18)
    first, second = corners[:, 0, :, None, None], corners[:, 1, :, None, None]
    return (
        first + (second - first) * ramp[:, None] + light[:, :, None, None] * glow[:, None]
    ).clamp(0.0, 1.0)
