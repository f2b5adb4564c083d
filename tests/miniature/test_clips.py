from __future__ import annotations

import torch

from ditune.miniature.clips import FRAMES, SIZE, render, sprites
from ditune.miniature.language import MOTIONS


def test_the_same_seed_renders_the_same_clips() -> None:
    first = render(4, torch.Generator().manual_seed(3))
    second = render(4, torch.Generator().manual_seed(3))
    assert torch.equal(first.frames, second.frames)
    assert first.frames.shape == (4, 3, FRAMES, SIZE, SIZE)
    assert first.frames.min() >= -1.0
    assert first.frames.max() <= 1.0


def test_held_out_scans_are_never_used_in_training() -> None:
    training, held_out = sprites(False)[0], sprites(True)[0]
    assert len(training) + len(held_out) == 1797
    assert len(held_out) > 250
    known = {scan.numpy().tobytes() for scan in training}
    shared = sum(scan.numpy().tobytes() in known for scan in held_out)
    assert shared == 0


def test_digits_move_as_their_caption_says() -> None:
    clips = render(200, torch.Generator().manual_seed(5))
    still = clips.frames.std(dim=2).mean(dim=1)  # where something changes
    assert bool((still.amax(dim=(1, 2)) > 0.1).all())
    axis = torch.linspace(-1, 1, SIZE)
    background = clips.frames.median(dim=2, keepdim=True).values
    shown = (clips.frames - background).abs().mean(dim=1)
    mass = shown.sum(dim=(2, 3)).clamp_min(1e-6)
    column = (shown.sum(dim=2) * axis).sum(-1) / mass
    row = (shown.sum(dim=3) * axis).sum(-1) / mass
    for name, track, sign in (
        ("moving left", column, -1),
        ("moving right", column, 1),
        ("moving up", row, -1),
        ("moving down", row, 1),
    ):
        chosen = clips.motion == MOTIONS.index(name)
        moved = (track[:, -1] - track[:, 0])[chosen] * sign
        assert float((moved > 0.1).float().mean()) > 0.95
