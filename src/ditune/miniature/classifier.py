"""The judge: a small network that says which digit, colour and motion a clip shows.

It is the reference-free quality metric of the miniature. It was trained on rendered clips only and
never saw a generated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditune.miniature.language import COLOUR_NAMES, DIGITS, MOTIONS, parse

ATTRIBUTES = ("digit", "colour", "motion")
_VIEWS = (0, 3, 6, 9, 12)  # the frames it looks at
_FEATURES = 128
_WEIGHTS = Path(__file__).parent / "weights" / "judge" / "judge.safetensors"


class Judge(nn.Module):
    """Classify clips [batch, 3, 13, 32, 32] in [-1, 1] by digit, colour and motion."""

    def __init__(self) -> None:
        """Build the untrained network."""
        super().__init__()
        layers: list[nn.Module] = []
        for inner, outer in ((3, 32), (32, 64), (64, 96)):
            layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, _FEATURES), nn.ReLU())
        self.digit = nn.Linear(_FEATURES, len(DIGITS))
        self.colour = nn.Linear(_FEATURES, len(COLOUR_NAMES))
        self.motion = nn.Sequential(
            nn.Linear(len(_VIEWS) * _FEATURES, 64), nn.ReLU(), nn.Linear(64, len(MOTIONS))
        )

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three logits, [batch, 10], [batch, 8] and [batch, 6]."""
        views = frames[:, :, list(_VIEWS)].transpose(1, 2).flatten(0, 1)
        features = self.trunk(views).unflatten(0, (-1, len(_VIEWS)))
        mean = features.mean(1)
        return self.digit(mean), self.colour(mean), self.motion(features.flatten(1))


def hits(model: Judge, frames: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """Return [clips, 3] booleans: whether digit, colour and motion are those of the caption.

    Args:
        model: The trained judge.
        frames: One array [13, 32, 32, 3] in [0, 1] per clip, as `WanPipeline` gives them.
        captions: The caption of each clip.
    """
    wanted = [parse(caption) for caption in captions]
    clips = torch.from_numpy(np.stack([np.asarray(clip, dtype=np.float32) for clip in frames]))
    with torch.no_grad():
        logits = model(clips.movedim(-1, 1) * 2.0 - 1.0)
    seen = torch.stack([logit.argmax(-1) for logit in logits], dim=1).numpy()
    right: np.ndarray = seen == np.array([[s.digit, s.colour, s.motion] for s in wanted])
    return right


@cache
def trained_judge() -> Judge:
    """Load the shipped judge once."""
    model = Judge()
    model.load_state_dict(load_file(_WEIGHTS))
    return model.eval().requires_grad_(False)


def judge(frames: Sequence[np.ndarray], captions: Sequence[str]) -> dict[str, float]:
    """Return how often generated clips show what their captions name.

    Args:
        frames: One array [13, 32, 32, 3] in [0, 1] per clip (`output_type="np"`).
        captions: The caption of each clip.

    Returns:
        The accuracies in [0, 1] under "digit", "colour" and "motion".
    """
    right = hits(trained_judge(), frames, captions).mean(axis=0)
    return {name: float(value) for name, value in zip(ATTRIBUTES, right, strict=True)}


class JudgeMetric:
    """The judge as a quality metric: the share of its caption's attributes that a clip shows."""

    name = "judge"
    needs_reference = False
    counts = True

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return the share of digit, colour and motion that is right, in [0, 1]."""
        return float(hits(trained_judge(), [video], [prompt]).mean())


class _OneAttribute:
    """The judge's word on one attribute: 1 if it is the caption's, else 0."""

    needs_reference = False
    counts = True
    attribute: str

    def score(self, video: np.ndarray, reference: np.ndarray | None, prompt: str) -> float:
        """Return 1.0 if a clip shows the attribute that its caption names, else 0.0."""
        return float(hits(trained_judge(), [video], [prompt])[0, ATTRIBUTES.index(self.attribute)])


class DigitMetric(_OneAttribute):
    """Whether the digit is right."""

    name, attribute = "judge_digit", "digit"


class ColourMetric(_OneAttribute):
    """Whether the colour is right."""

    name, attribute = "judge_colour", "colour"


class MotionMetric(_OneAttribute):
    """Whether the motion is right."""

    name, attribute = "judge_motion", "motion"
