"""Where in a pipeline call a forward is: its step, its branch, and whether a new call has begun."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditune.accel.internals import Context
from ditune.accel.mixcache import BATCHED, COND
from ditune.accel.noise import tells_ratios
from ditune.accel.request import guides

_ABORTED = 3  # interrupted calls in a row are no longer taken for that
_CONDITIONS = ("encoder_hidden_states", "prompt_embeds", "encoder_hidden_states_t5")


@dataclass(frozen=True)
class Where:
    """Where in a pipeline call one forward is; `sigma` is None where the scheduler has none."""

    branch: str
    step: int
    steps: int
    sigma: float | None
    ratio: bool = False  # sigma is noise / signal, without a limit, not the share of flow matching

    @property
    def flow_sigma(self) -> float | None:
        """The noise level as flow matching has it: 0 is clean, 1 is noise."""
        if self.sigma is None or not self.ratio:
            return self.sigma
        return self.sigma / (1.0 + self.sigma)


class Locator:
    """Follows the forwards of one pipeline from call to call."""

    def __init__(self, pipe: Any) -> None:
        """Start before the first call."""
        self._pipe = pipe
        self._step = -1
        self._branches: set[str] = set()
        self._conditions: list[weakref.ref[Tensor]] = []
        self._both: bool | None = None  # whether a batch holds both branches
        self._standing = 0  # calls in a row that ended before their second step

    def reset(self) -> None:
        """Take the next forward for the first of a call, whatever its step."""
        self._step, self._branches, self._conditions = -1, set(), []
        self._both = None

    def locate(self, context: Context | None, kwargs: Mapping[str, Any]) -> Where | None:
        """Return where a forward is, None if its branch cannot be told.

        What the pipeline says counts most. A pipeline that says nothing still hands each branch its
        own prompt embeddings, the same tensor at every step.

        Args:
            context: What the pipeline said about the forward.
            kwargs: The forward's named arguments.
        """
        step = context.step if context is not None else None
        step = self._scheduled_step(kwargs) if step is None else step
        if step is None:
            return None
        if step < self._step:
            self.reset()
        branch = self._branch_of(kwargs) if context is None else self._named(context.branch, step)
        if branch is None:
            return None
        steps = context.steps if context is not None else None
        sigma = context.sigma if context is not None else None
        return Where(
            branch=branch,
            step=step,
            steps=len(self._pipe.scheduler.timesteps) if steps is None else steps,
            sigma=self._sigma(step) if sigma is None else sigma,
            ratio=tells_ratios(self._pipe.scheduler),
        )

    def begins(self, where: Where) -> bool:
        """Whether this is the first forward of a call: the step fell, or a branch came again."""
        again = where.step == self._step and where.branch in self._branches
        fresh = self._step < 0 or where.step < self._step or again
        if where.step > 0:
            self._standing = 0
        elif again:
            self._standing += 1
        if fresh or where.step != self._step:
            self._branches = set()
        self._step = where.step
        self._branches.add(where.branch)
        return fresh

    @property
    def stands_still(self) -> bool:
        """Whether one call after the other seems to end at its first step.

        So it looks where a pipeline steps copies of its scheduler (SkyReels' diffusion forcing).
        """
        return self._standing >= _ABORTED

    def _named(self, branch: str, step: int) -> str:
        """Return a branch's name; pipelines that batch both say so even where there is but one."""
        if branch != BATCHED:
            return branch
        if self._both is None or step == 0:
            self._both = guides(self._pipe) is not False
        return BATCHED if self._both else COND

    def _scheduled_step(self, kwargs: Mapping[str, Any]) -> int | None:
        """Return the step that the scheduler is about to take."""
        scheduler = self._pipe.scheduler
        if hasattr(scheduler, "step_index"):
            index = scheduler.step_index
            return int(index if index is not None else getattr(scheduler, "begin_index", None) or 0)
        now = getattr(self._pipe, "current_timestep", None)
        now = kwargs.get("timestep") if now is None else now
        if now is None:
            return None
        value = float(now.flatten()[0]) if isinstance(now, Tensor) else float(now)
        return int((scheduler.timesteps.float() - value).abs().argmin())

    def _sigma(self, step: int) -> float | None:
        scheduler = self._pipe.scheduler
        sigmas = getattr(scheduler, "sigmas", None)
        if sigmas is not None:
            return float(sigmas[step])
        alphas = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            return None
        alpha = float(alphas[int(scheduler.timesteps[step])])
        return float(((1.0 - alpha) / max(alpha, 1e-12)) ** 0.5)

    def _branch_of(self, kwargs: Mapping[str, Any]) -> str | None:
        """Return a name for the branch whose prompt embeddings are these."""
        found = next((kwargs[n] for n in _CONDITIONS if isinstance(kwargs.get(n), Tensor)), None)
        if found is None:
            return None
        for place, known in enumerate(self._conditions):
            if known() is found:
                return f"branch {place}"
        self._conditions.append(weakref.ref(found))
        return f"branch {len(self._conditions) - 1}"
