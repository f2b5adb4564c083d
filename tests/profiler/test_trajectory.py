from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ditune.accel.tap import Observation
from ditune.profiler.trajectory import SAMPLED, Trajectory, TrajectoryRecorder


def seen(
    step: int, branch: str, output: Tensor, latents: Tensor, sigma: float | None
) -> Observation:
    return Observation(
        step=step,
        steps=2,
        sigma=sigma,
        branch=branch,
        latents=latents,
        output=output,
        span=None,
        sibling=None,
    )


def test_guided_outputs_and_latents_become_inner_products() -> None:
    recorder = TrajectoryRecorder(guidance_scale=3.0)
    generator = torch.Generator().manual_seed(0)
    guided, inputs = [], []
    for _call in range(2):
        for step, sigma in enumerate((1.0, 0.5)):
            cond, uncond, latents = torch.randn(3, 1, 2, 4, generator=generator)
            recorder.watch(seen(step, "cond", cond, latents, sigma))
            recorder.watch(seen(step, "uncond", uncond, latents, sigma))
            guided.append((uncond + 3.0 * (cond - uncond)).flatten())
            inputs.append(latents.flatten())
    first, second = recorder.trajectories()
    rows = torch.stack([*guided[2:], *inputs[2:]]).double()
    np.testing.assert_allclose(second.gram, (rows @ rows.T / 8).numpy(), atol=1e-6)
    assert first.steps == 2
    assert first.sigmas.tolist() == [1.0, 0.5]


def test_both_halves_of_a_batch_are_guided_apart() -> None:
    recorder = TrajectoryRecorder(guidance_scale=2.0)
    uncond, cond = torch.ones(1, 4), torch.full((1, 4), 2.0)
    latents = torch.zeros(2, 4)
    for step in range(2):
        recorder.watch(seen(step, "cond_uncond", torch.cat([uncond, cond]), latents, 0.5))
    (found,) = recorder.trajectories()
    assert found.gram[0, 0] == 9.0  # 1 + 2 * (2 - 1), squared


def test_changes_are_relative_to_the_size_of_outputs() -> None:
    outputs = np.array([[2.0, 0.0], [2.0, 2.0], [2.0, 2.0]])
    rows = np.concatenate([outputs, np.zeros_like(outputs)])
    found = Trajectory(rows @ rows.T / 2.0, np.array([1.0, 0.6, 0.3])).changes
    size = np.sqrt((outputs**2).sum(axis=1).mean())
    np.testing.assert_allclose(found, [2.0 / size, 0.0], atol=1e-7)


def test_unknown_noise_levels_give_no_trajectory() -> None:
    recorder = TrajectoryRecorder(guidance_scale=1.0)
    for step in range(2):
        recorder.watch(seen(step, "cond", torch.ones(1, 4), torch.ones(1, 4), None))
    assert recorder.trajectories() == ()


def test_outputs_of_another_shape_give_no_trajectory() -> None:
    recorder = TrajectoryRecorder(guidance_scale=1.0)
    for step in range(2):
        recorder.watch(seen(step, "cond", torch.ones(9), torch.ones(1, 4), 0.5))
    assert recorder.trajectories() == ()


def test_large_latents_are_sampled_and_conditions_left_out() -> None:
    recorder = TrajectoryRecorder(guidance_scale=1.0)
    output = torch.ones(1, 1, 4 * SAMPLED)
    latents = torch.cat([output * 2.0, output * 9.0], dim=1)  # noise channels, then a condition
    for step in range(2):
        recorder.watch(seen(step, "cond", output, latents, 0.5))
    (found,) = recorder.trajectories()
    np.testing.assert_allclose(found.gram[2:, 2:], 4.0)
