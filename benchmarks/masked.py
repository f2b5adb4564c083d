"""The miniature's videos under thousands of step masks, many at once, without its pipeline.

One plain call of the pipeline says what it asks of the transformer. After that, a video under a
mask that forecasts outputs in a line is sums of outputs, so that videos with different prompts and
masks share a forward. What comes out is compared with the pipeline under the same policy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditune.miniature.system import MiniatureSource
from ditune.profiler.trajectory import Trajectory
from ditune.tuner.evaluate import Case
from ditune.tuner.quality import PSNR_CAP_DB

_TOGETHER = {"cpu": 2, "cuda": 128}  # forwards of one branch


class Attempt(NamedTuple):
    """One video to make: of which case, which steps are computed, what forecasts run over."""

    case: int
    computed: tuple[int, ...]
    positions: tuple[float, ...]


@dataclass
class _Asked:
    """What the pipeline asked of the transformer, forward by forward."""

    latents: list[Tensor]
    timesteps: list[Tensor]
    texts: list[Tensor]
    answers: list[Tensor]


class MaskedVideos:
    """Videos of some cases under step masks, scored against the plain ones."""

    def __init__(self, source: MiniatureSource, cases: Sequence[Case], device: str) -> None:
        """Make the plain videos."""
        torch.backends.cudnn.allow_tf32 = False
        self.cases = list(cases)
        self._pipe = source.pipe.to(device)
        self._scale = float(source.call["guidance_scale"])
        self._together = _TOGETHER[device]
        with _listening(self._pipe.transformer) as asked:
            generators = [torch.Generator().manual_seed(case.seed) for case in cases]
            prompts = [case.prompt for case in cases]
            self._pipe(
                prompt=prompts, generator=generators, **{**source.call, "output_type": "latent"}
            )
        conditional = slice(0, None, 2)
        self._texts = torch.stack(asked.texts[:2])  # [2 branches, cases, tokens, width]
        self._noise = asked.latents[0]
        self._times = [time[:1] for time in asked.timesteps[conditional]]
        self._widths = self._pipe.scheduler.sigmas.diff().tolist()
        self.steps = len(self._times)
        outputs = [self._guided(*pair) for pair in _pairs(asked.answers)]
        self._trajectories = self._summed(outputs, asked.latents[conditional])
        every = tuple(range(self.steps))
        even = tuple(float(step) for step in every)
        self._plain = self._videos([Attempt(case, every, even) for case in range(len(cases))])

    def trajectory(self, case: int) -> Trajectory:
        """Return the plain trajectory of a case."""
        return self._trajectories[case]

    @torch.no_grad()
    def psnr(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return the PSNR of each attempt's video against the plain one of its case, in dB."""
        videos = self._videos(attempts)
        plain = self._plain[[attempt.case for attempt in attempts]]
        errors = (videos - plain).square().flatten(1).mean(1)
        found: list[float] = (-10.0 * errors.log10()).clamp_max(PSNR_CAP_DB).tolist()
        return found

    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        return uncond + self._scale * (cond - uncond)

    def _summed(self, outputs: Sequence[Tensor], latents: Sequence[Tensor]) -> list[Trajectory]:
        """Return the inner products of each case's outputs and latents."""
        vectors = torch.stack([*outputs, *latents]).flatten(2).double()  # [2 steps, cases, values]
        sigmas = self._pipe.scheduler.sigmas[:-1].cpu().numpy()
        found = []
        for rows in vectors.unbind(1):
            gram: np.ndarray = (rows @ rows.T / rows.shape[1]).cpu().numpy()
            found.append(Trajectory(gram, sigmas))
        return found

    @torch.no_grad()
    def _videos(self, attempts: Sequence[Attempt]) -> Tensor:
        """Return the videos [attempts, 3, frames, height, width] in [0, 1]."""
        cases = torch.tensor([attempt.case for attempt in attempts])
        latents = self._noise[cases].clone()
        last, before = torch.zeros_like(latents), torch.zeros_like(latents)
        for step, width in enumerate(self._widths):
            now = [row for row, attempt in enumerate(attempts) if step in attempt.computed]
            if now:
                before[now] = last[now]
                last[now] = self._outputs(latents[now], cases[now], step)
            ahead = torch.tensor([_ahead(attempt, step) for attempt in attempts])
            ahead = ahead.to(latents).view(-1, 1, 1, 1, 1)
            latents += width * (last + ahead * (last - before))
        return torch.cat([self._decoded(part) for part in latents.split(self._together)])

    def _outputs(self, latents: Tensor, cases: Tensor, step: int) -> Tensor:
        """Return the guided outputs of one step for some latents."""
        found = []
        for rows in torch.arange(len(latents)).split(self._together):
            answers = [
                self._pipe.transformer(
                    hidden_states=latents[rows],
                    timestep=self._times[step].expand(len(rows)),
                    encoder_hidden_states=text[cases[rows]],
                    return_dict=False,
                )[0]
                for text in self._texts
            ]
            found.append(self._guided(answers[0], answers[1]))
        return torch.cat(found)

    def _decoded(self, latents: Tensor) -> Tensor:
        vae = self._pipe.vae
        mean, std = (
            torch.tensor(values).to(latents).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        video: Tensor = vae.decode(latents * std + mean, return_dict=False)[0]
        return (video / 2 + 0.5).clamp(0, 1)


def _ahead(attempt: Attempt, step: int) -> float:
    """Return how far a step lies behind the last computed one, in distances of the last two."""
    known = [each for each in attempt.computed if each <= step][-2:]
    if len(known) < 2:
        return 0.0
    first, second = (attempt.positions[each] for each in known)
    return (attempt.positions[step] - second) / (second - first)


def _pairs(answers: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(answers[::2], answers[1::2], strict=True)


@contextmanager
def _listening(transformer: Any) -> Iterator[_Asked]:
    """Note what a transformer is asked and answers."""
    asked = _Asked([], [], [], [])

    def note(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        asked.latents.append(kwargs["hidden_states"].clone())
        asked.timesteps.append(kwargs["timestep"])
        asked.texts.append(kwargs["encoder_hidden_states"])
        asked.answers.append(output[0].clone())

    handle = transformer.register_forward_hook(note, with_kwargs=True)
    try:
        yield asked
    finally:
        handle.remove()
