"""Time pipelines: whole calls in interleaved pairs, and layers one by one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ditune.accel.anatomy import denoisers
from ditune.accel.spans import BlockStack
from ditune.db.records import LayerTiming
from ditune.profiler.statistics import quantiles

T = TypeVar("T")
OUTSIDE = "outside of layers"  # the name under which a clock gives what no layer took


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return what `work` returns and how long it took in milliseconds of wall-clock."""
    synchronize(device)
    started = time.perf_counter()
    result = work()
    synchronize(device)
    return result, (time.perf_counter() - started) * 1e3


class LayerClock:
    """Collects the duration of every call of chosen modules while it is attached.

    What lies outside of all of them is a gap: it is timed as such, because as a difference of sums
    it would drown in the noise of what is large.
    On CUDA it records events and reads them once at the end, so nothing waits in between.
    """

    def __init__(self, device: torch.device) -> None:
        """Create a clock for modules on one device."""
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._started: dict[str, Any] = {}
        self._gaps: list[tuple[Any, Any]] = []
        self._idle_since: Any = None

    @contextmanager
    def attached(self, modules: dict[str, nn.Module]) -> Iterator[LayerClock]:
        """Time the named modules for the duration of the block."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave(name)))
        self._idle_since = self._now()
        try:
            yield self
        finally:
            self._gaps.append((self._idle_since, self._now()))
            for handle in handles:
                handle.remove()

    def timings(self) -> tuple[LayerTiming, ...]:
        """Return the layers in the order in which they first ran, and what was outside of them."""
        if self._cuda:
            torch.cuda.synchronize()
        found = []
        for name, spans in self._spans.items():
            lasted = [self._milliseconds(start, end) for start, end in spans]
            p20, p50, p80 = quantiles(lasted)
            found.append(
                LayerTiming(name=name, median_ms=p50, p20_ms=p20, p80_ms=p80, n=len(lasted))
            )
        outside = sum(self._milliseconds(start, end) for start, end in self._gaps)
        found.append(
            LayerTiming(name=OUTSIDE, median_ms=outside, p20_ms=outside, p80_ms=outside, n=1)
        )
        return tuple(found)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _milliseconds(self, start: Any, end: Any) -> float:
        lasted = start.elapsed_time(end) if self._cuda else (end - start) * 1e3
        return float(lasted)

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            now = self._now()
            if not self._started:
                self._gaps.append((self._idle_since, now))
            self._started[name] = now

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            now = self._now()
            self._spans[name].append((self._started.pop(name), now))
            if not self._started:
                self._idle_since = now

        return hook


def layers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the modules worth timing: text encoder, blocks, whole transformers, VAE decoder.

    Of a transformer also what stands beside the blocks, its embeddings and its head.
    """
    modules: dict[str, nn.Module] = {}
    if isinstance(encoder := getattr(pipe, "text_encoder", None), nn.Module):
        modules["text_encoder"] = encoder
    for model, name in zip(denoisers(pipe), ("transformer", "transformer_2"), strict=False):
        stack = BlockStack(model)
        beside = {k: part for k, part in model.named_children() if k not in stack.names}
        parts = {**stack.named_blocks(), **beside}
        modules |= {f"{name}.{part}": module for part, module in parts.items()}
        modules[name] = model
    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if isinstance(decoder, nn.Module):
        modules["vae.decoder"] = decoder
    return modules
