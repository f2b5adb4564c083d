"""A profile and trajectories as a profiler would record them, of a pipeline that does not exist."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditune.db.records import (
    Constraint,
    Hardware,
    LayerTiming,
    Profile,
    Settings,
    Software,
    StepRedundancy,
    Workload,
)
from ditune.profiler.trajectory import Trajectory
from ditune.tuner.space import Space

STEPS = 50
PROMPTS = "sha256:" + "0" * 64  # their digest
_DEPTH = 10
_SHIFT = 3.0
_WIDTH = 16  # numbers in an output
_TURN = 0.15  # how much of its direction an output's path loses from step to step


def trajectories_of(changes: np.ndarray, seed: int, count: int = 2) -> list[Trajectory]:
    """Return plain generations whose outputs move as fast as asked, on paths that turn slowly.

    Args:
        changes: How far outputs move at each step, relative to each other [steps].
        seed: Of the paths; every prompt has its own.
        count: How many.
    """
    return [_trajectory(changes, np.random.default_rng([seed, n])) for n in range(count)]


def profile_of(trajectories: Sequence[Trajectory]) -> Profile:
    """Return the profile that goes with some trajectories."""
    changes = np.mean([t.changes for t in trajectories], axis=0)
    sigmas = trajectories[0].sigmas
    return Profile(
        hardware=Hardware(
            device_name="simulated", kind="cpu", capability="none", cores=1, memory_bytes=1
        ),
        software=Software(torch="2", triton=None, diffusers="0", transformers="5", ditune="0"),
        workload=Workload(
            pipeline_class="Simulated",
            transformer_class="Simulated",
            model_digest="sha256:" + "0" * 64,
            model_revision=None,
            dtype="float32",
            height=32,
            width=32,
            frames=13,
            steps=STEPS,
            scheduler_class="Euler",
            scheduler_shift=_SHIFT,
            guidance=True,
            batch=1,
            attention_backend="native",
        ),
        prompts=len(trajectories),
        total_ms=1_000.0,
        layers=tuple(
            LayerTiming(name=f"transformer.blocks.{i}", median_ms=1, p20_ms=1, p80_ms=1, n=100)
            for i in range(_DEPTH)
        ),
        redundancy=tuple(
            StepRedundancy(
                step=step,
                sigma=float(sigmas[step]),
                step_change=None if step == 0 else float(changes[step - 1]),
                cfg_change=None if step == 0 else 1.5 * float(changes[step - 1]),
                block_change=None if step == 0 else 1.2 * float(changes[step - 1]),
            )
            for step in range(STEPS)
        ),
        disagreement=None,
        peak_bytes=None,
        clocks=None,
        status="simulated",
    )


def even_profile() -> Profile:
    """Return the profile of a pipeline whose outputs move at an even pace."""
    return profile_of(trajectories_of(np.ones(STEPS), 0))


def settings(constraints: tuple[Constraint, ...], seed: int, space: Space) -> Settings:
    """Return the settings of a simulated search; its prompts are only names."""
    profile = even_profile()
    return Settings(
        hardware=profile.hardware,
        software=profile.software,
        workload=profile.workload,
        constraints=constraints,
        prompts_digest=PROMPTS,
        seed=seed,
        space=space.digest,
    )


def _trajectory(changes: np.ndarray, random: np.random.Generator) -> Trajectory:
    share = 1.0 - np.arange(STEPS) / STEPS
    sigmas = _SHIFT * share / (1.0 + (_SHIFT - 1.0) * share)
    heading = _unit(random.normal(size=_WIDTH))
    outputs = [3.0 * _unit(random.normal(size=_WIDTH))]
    for change in changes[1:] / changes.mean():
        heading = _unit(heading + _TURN * random.normal(size=_WIDTH))
        outputs.append(outputs[-1] + 0.12 * change * heading)
    moves = np.diff(np.append(sigmas, 0.0))[:, None] * np.array(outputs)
    latents = random.normal(size=_WIDTH) + np.vstack(
        [np.zeros(_WIDTH), np.cumsum(moves, axis=0)[:-1]]
    )
    both = np.vstack([outputs, latents])
    return Trajectory(gram=both @ both.T / _WIDTH, sigmas=sigmas)


def _unit(vector: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = vector / np.linalg.norm(vector)
    return scaled
