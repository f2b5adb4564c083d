"""How much an error of each granularity matters: noise at one step, and what becomes of it.

Source: MixCache (arXiv 2508.12691) names an offline analysis with Gaussian noise; the procedure is
ours. The steps before the noise are answered from the plain run, so that a run costs only what
comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from ditune.accel.anatomy import denoisers
from ditune.accel.internals import ForwardHook, Output, attach, detach
from ditune.accel.location import Locator, Where
from ditune.accel.mixcache import BATCHED, COND, UNCOND
from ditune.accel.payload import relative_l1
from ditune.accel.spans import BlockStack
from ditune.db.policy import Granularity
from ditune.db.records import Impacts

_HOOK = "ditune_impact"
_AT = (0.35, 0.65)  # where in the steps noise is added
_NOISE = 0.05  # standard deviation, as a share of what it is added to
_Key = tuple[int, str]


def impacts(
    pipe: Any,
    prompt: str,
    *,
    call: Mapping[str, Any],
    seed: int = 0,
    at: tuple[float, ...] = _AT,
    spent: Callable[[int], None] = lambda _: None,
) -> Impacts | None:
    """Measure the impacts of a pipeline; costs up to four generations.

    Args:
        pipe: A diffusers pipeline without ditune on.
        prompt: What is generated.
        call: The pipeline's arguments besides the prompt.
        seed: Of the noise that generation starts from.
        at: Where noise is added, as fractions of the steps; impacts are averaged over them.
        spent: Called at the end with the number of forwards that it took.

    Returns:
        None where the pipeline does not say which branch runs.
    """
    study = _Study(pipe, prompt, {**call, "output_type": "latent"}, seed)
    found = _measured(study, at)
    spent(study.forwards)
    if "step" not in found:
        return None
    largest = max(found.values())
    return Impacts(
        step=found["step"] / largest,
        cfg=found["cfg"] / largest if "cfg" in found else None,
        block=found["block"] / largest if "block" in found else None,
    )


def _measured(study: _Study, at: tuple[float, ...]) -> dict[Granularity, float]:
    """Return by how much errors of each granularity grow."""
    plain = study.run(None, 0)
    if not study.outputs:
        return {}
    steps = 1 + max(step for step, _ in study.outputs)
    branches = {branch for _, branch in study.outputs}
    kinds: list[Granularity] = ["step"]
    kinds += ["cfg"] if branches & {UNCOND, BATCHED} else []
    kinds += ["block"] if not any(stack.problem for stack in study.stacks.values()) else []
    found: dict[Granularity, float] = {}
    for kind in kinds:
        ratios = []
        for share in at:
            final = study.run(kind, min(int(share * steps), steps - 1))
            if study.injected:
                ratios.append(float(relative_l1(final, plain)) / mean(study.injected))
        if ratios and mean(ratios) > 0:
            found[kind] = mean(ratios)
    return found


class _Study:
    """One prompt, generated plainly once and then with noise at one step."""

    def __init__(self, pipe: Any, prompt: str, call: dict[str, Any], seed: int) -> None:
        self.pipe = pipe
        self.outputs: dict[_Key, Output] = {}  # of the plain run
        self.injected: list[float] = []  # relative size of the noise, once for each branch
        self.stacks = {id(model): BlockStack(model) for model in denoisers(pipe)}
        self.forwards = 0  # run so far
        self.kind: Granularity | None = None
        self.at = 0
        self._locator = Locator(pipe)
        self._generate: Callable[[], Any] = lambda: pipe(
            prompt=prompt, generator=torch.Generator().manual_seed(seed), return_dict=False, **call
        )
        self._noise = torch.Generator()

    def run(self, kind: Granularity | None, at: int) -> Tensor:
        """Generate with noise of a kind at a step, plainly for None; return the final latents."""
        self.kind, self.at, self.injected = kind, at, []
        self._noise.manual_seed(at)
        self._locator.reset()
        with ExitStack() as hooks:
            for model in denoisers(self.pipe):
                attach(model, _Hook(self), _HOOK)
                hooks.callback(detach, model, _HOOK)
            latents: Tensor = self._generate()[0]
        return latents

    def forward(
        self, hook: ForwardHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Do one forward of the run that is on."""
        where = self._locator.locate(hook.context(), kwargs)
        if where is None:
            return self._run(hook, args, kwargs)
        key = (where.step, where.branch)
        if self.kind is None:
            return self._plain(hook, module, args, kwargs, key)
        if where.step < self.at:
            known = self.outputs[key]
            return known.rebuild(known.sample)
        if where.step > self.at:
            return self._run(hook, args, kwargs)
        if self.kind == "block":
            return self._noisy_blocks(hook, module, args, kwargs)
        output = Output.of(self._run(hook, args, kwargs))
        return output.rebuild(self._noisy(output.sample, where))

    def _run(self, hook: ForwardHook, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.forwards += 1
        return hook.original(*args, **kwargs)

    def _plain(
        self,
        hook: ForwardHook,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        key: _Key,
    ) -> Any:
        stack = self.stacks[id(module)]
        with stack.recording([(1, 0)]):  # learns how blocks hang together
            returned = self._run(hook, args, kwargs)
        self.outputs[key] = Output.of(returned)
        return returned

    def _noisy(self, sample: Tensor, where: Where) -> Tensor:
        """Return an output with noise on all of it (step), or on the unconditional part (cfg)."""
        noise = self._like(sample)
        if self.kind == "step":
            self._note(noise, sample)
            return sample + noise
        if where.branch == BATCHED:
            half = len(sample) // 2
            noise[half:] = 0.0
            self._note(noise[:half], sample[half:])
            return sample + noise
        if where.branch == UNCOND:
            self._note(noise, self.outputs[where.step, COND].sample)
            return sample + noise
        return sample

    def _noisy_blocks(
        self,
        hook: ForwardHook,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        stack = self.stacks[id(module)]
        with stack.recording([(1, 0)]) as recording:
            output = self._run(hook, args, kwargs)
        residual = recording.residuals[0]
        if residual is None:
            return output
        noise = [self._like(tensor) for tensor in residual]
        self._note(noise[0], residual[0])
        noisy = tuple(r + n for r, n in zip(residual, noise, strict=True))
        with stack.replacing((1, 0), noisy):
            return self._run(hook, args, kwargs)

    def _like(self, target: Tensor) -> Tensor:
        """Return noise for a tensor, the same on every device."""
        noise = torch.randn(target.shape, generator=self._noise)
        return (noise * float(target.float().std()) * _NOISE).to(target.device, target.dtype)

    def _note(self, noise: Tensor, target: Tensor) -> None:
        self.injected.append(float(relative_l1(target + noise, target)))


class _Hook(ForwardHook):
    def __init__(self, study: _Study) -> None:
        super().__init__()
        self._study = study

    def around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._study.forward(self, module, args, kwargs)
