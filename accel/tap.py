"""Watch every forward of a denoiser without changing it; the profiler's redundancy rests on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ditune.accel.anatomy import denoisers
from ditune.accel.internals import ForwardHook, Output, attach, detach, latents_of
from ditune.accel.location import Locator
from ditune.accel.payload import byte_count
from ditune.accel.sibling import Sibling
from ditune.accel.spans import BlockStack

TAP_NAME = "ditune_tap"


@dataclass(frozen=True)
class Observation:
    """One forward: where it was, what went in and out, and the residual of its middle blocks.

    `sibling` is what the small model says to the same input, None without one.
    """

    step: int | None
    steps: int | None
    sigma: float | None
    branch: str
    latents: Tensor
    output: Tensor
    span: Tensor | None
    sibling: Tensor | None
    span_bytes: int = 0  # of everything that flows through the span, 0 if nothing is known


class _Tap(ForwardHook):
    def __init__(
        self,
        stack: BlockStack,
        small: Sibling | None,
        watch: Callable[[Observation], None],
        locator: Locator,
    ) -> None:
        super().__init__()
        self._stack = stack
        self._locator = locator
        self._small = small
        self._watch = watch

    def around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._stack.recording([(1, 0)]) as recording:
            output = self.original(*args, **kwargs)
        residual = recording.residuals[0]
        where = self._locator.locate(self.context(), kwargs)
        if where is not None:
            self._locator.begins(where)
        self._watch(
            Observation(
                step=where.step if where else None,
                steps=where.steps if where else None,
                sigma=where.sigma if where else None,
                branch=where.branch if where else "",
                latents=latents_of(args, kwargs),
                output=Output.of(output).sample,
                span=residual[0] if residual else None,
                span_bytes=sum(byte_count(tensor) for tensor in residual or ()),
                sibling=Output.of(self._small(*args, **kwargs)).sample if self._small else None,
            )
        )
        return output

    def finish(self) -> None:
        self._locator.reset()


@contextmanager
def tapped(pipe: Any, watch: Callable[[Observation], None], small: Any = None) -> Iterator[None]:
    """Call `watch` after every forward of the pipeline's denoisers; outputs stay bit-identical.

    Args:
        pipe: A pipeline without ditune on.
        watch: Receives every forward in order.
        small: If given, it is run on the same inputs and its output handed over as `sibling`: a
            transformer, or its pipeline.

    Raises:
        UsageFault: The small model cannot take over.
    """
    models = denoisers(pipe)
    sibling = Sibling.of(pipe, small) if small is not None else None
    locator = Locator(pipe)
    for model in models:
        attach(model, _Tap(BlockStack(model), sibling, watch, locator), TAP_NAME)
    try:
        yield
    finally:
        for model in models:
            detach(model, TAP_NAME)
