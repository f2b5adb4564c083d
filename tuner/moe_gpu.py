"""Tiles of expert layers for the GPU that is here: the sieve's few, compiled, checked and timed.

Times are those of a cold cache: between two calls in a model lie other layers. Each GEMM is tuned
alone, then the layer is timed as a whole against its default tiles.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from triton.errors import TritonError

from ditune.db.errors import UsageFault
from ditune.db.moe import LayerTiles, MoeChoice, MoeShape, RoutingBucket, TileConfig, default_tiles
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import DeviceProperties, Gpu, calibrated, gpu_to_calibrate
from ditune.kernels.offline import compile_gemm, faults
from ditune.kernels.reference import Experts
from ditune.kernels.routing import Routing, route
from ditune.kernels.tile_space import sieve
from ditune.kernels.triton_grouped_gemm import grouped_gemm
from ditune.kernels.triton_moe import moe
from ditune.kernels.variants import Variant
from ditune.tuner.drawn import drawn, experts_of, tokens_of
from ditune.tuner.moe import Progress, Routed, Tuned, by_tokens
from ditune.tuner.race import race

_SIDE = 8192  # of the matrices whose product is taken for the peak
_COPIED = 2**31  # bytes
_FLUSHES = 8  # times the second-level cache
_REPEATS = 20


@dataclass(frozen=True)
class Bench:
    """Where tiles are timed.

    Args:
        device: Where tensors lie.
        gpu: What the model knows of it.
        us: Times one call, in microseconds.
        sound: Returns those configurations of a GEMM that compile well.
    """

    device: torch.device
    gpu: Gpu
    us: Callable[[Callable[[], object]], float]
    sound: Callable[[Gemm, Sequence[TileConfig]], list[TileConfig]]


def bench_of(device: torch.device) -> Bench:
    """Return the bench of a CUDA device, its peaks measured; takes a second.

    Raises:
        UsageFault: The kernels need a later GPU.
    """
    gpu = gpu_to_calibrate(cast(DeviceProperties, torch.cuda.get_device_properties(device)))
    us = cold_clock(device)

    def best(call: Callable[[], object]) -> float:
        return min(us(call) for _ in range(_REPEATS))

    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target, one = torch.empty_like(source), torch.ones(1, device=device)
    gpu = calibrated(
        gpu,
        teraflops=2 * _SIDE**3 / best(lambda: a @ b) / 1e6,
        gigabytes_per_s=2 * _COPIED / best(lambda: target.copy_(source)) / 1e3,
        launch_us=best(lambda: one.add_(1)),
    )
    return Bench(device, gpu, us, partial(compiles_well, arch=gpu.cc))


def cold_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Return what times one call on a CUDA device in microseconds, its cache cold before.

    While the cache is cleared, the host is far ahead: its own time is not in the figure.
    """
    bytes_ = _FLUSHES * torch.cuda.get_device_properties(device).L2_cache_size
    flushed = torch.empty(bytes_, dtype=torch.uint8, device=device)

    def us(call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000.0

    return us


def compiles_well(gemm: Gemm, configs: Sequence[TileConfig], arch: int) -> list[TileConfig]:
    """Return the configurations in which nothing is wrong; the launch finds them in the cache."""
    workers = min(len(configs), os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        wrong = pool.map(partial(_fault, gemm=gemm, arch=arch), configs)
        return [config for config, fault in zip(configs, wrong, strict=True) if not fault]


def _fault(config: TileConfig, gemm: Gemm, arch: int) -> str:
    try:
        return "; ".join(faults(compile_gemm(gemm, config, arch), config, arch))
    except UsageFault as fault:
        return str(fault)


def timed(
    shape: MoeShape, routed: Sequence[Routed], bench: Bench, progress: Progress
) -> tuple[Tuned, ...]:
    """Return tiles for each bucket of routings, timed on a device.

    Args:
        shape: Of the layer.
        routed: The routings that matter.
        bench: Where it is timed.
        progress: Is told what is being done.

    Raises:
        UsageFault: The default tiles cannot compute the layer on this device, and routings that
            nobody tuned would have them.
    """
    layer = _Layer(shape, bench, experts_of(shape, bench.device))
    found: list[Tuned] = []
    for buckets in by_tokens(routed):
        everything = [each.counts for group in buckets.values() for each in group]
        fields, notes = [], []
        for gemm in layer_gemms(shape):
            sieved = sieve(gemm, everything, bench.gpu)
            kept = [each.config for each in sieved.kept]
            progress(f"compiling {len(kept)} configurations of a GEMM for sm_{bench.gpu.cc}")
            fields.append(bench.sound(gemm, kept))
            notes.append(f"{sieved.left['grid']} to {len(kept)}, {len(fields[-1])} compiled well")
        for bucket, group in buckets.items():
            progress(f"timing {group[0].name}")
            inputs = [layer.inputs(each) for each in group]
            found.append(layer.tuned(bucket, group, inputs, fields, "; ".join(notes)))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """One routing's tokens, what the router says, and rows as they come to the second GEMM."""

    hidden: Tensor
    indices: Tensor
    weights: Tensor
    routing: Routing
    gated: Tensor


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer with drawn weights on a bench."""

    shape: MoeShape
    bench: Bench
    experts: Experts

    def inputs(self, routed: Routed) -> _Inputs:
        """Draw what a routing brings."""
        device, rows = self.bench.device, routed.tokens * self.shape.top_k
        hidden, indices, weights = tokens_of(routed, self.shape, device)
        gated = drawn((rows, self.shape.inner), self.shape, device)
        return _Inputs(hidden, indices, weights, route(indices, self.shape.experts), gated)

    def tuned(
        self,
        bucket: RoutingBucket,
        group: Sequence[Routed],
        inputs: Sequence[_Inputs],
        fields: Sequence[Sequence[TileConfig]],
        note: str,
    ) -> Tuned:
        """Race the tiles of each GEMM, then the layer with the winners against the default."""
        winners = [self._raced(half, fields[half], inputs) for half in (0, 1)]
        default = default_tiles(self.shape.dtype)
        tiles = LayerTiles(up=winners[0], down=winners[1])
        ended = race([tiles], default, lambda each: self._layer_us(each, inputs))
        choice = MoeChoice(
            bucket=bucket,
            tiles=ended.winner,
            status="measured",
            speedup=ended.speedup.median,
        )
        us = self._layer_us(ended.winner, inputs[:1])
        return Tuned(choice, tuple(each.name for each in group), us, note)

    def _raced(
        self, half: int, field: Sequence[TileConfig], inputs: Sequence[_Inputs]
    ) -> TileConfig:
        wanted, default = self._wanted(half, inputs[0]), default_tiles(self.shape.dtype).up
        if not self._is_right(half, default, inputs[0], wanted):
            raise UsageFault(
                f"the default tiles cannot compute {self.shape.words} on this {self.bench.gpu.name}"
                ": they need more than it has, or give something else than plain torch does; try "
                "another dtype"
            )
        right = [c for c in field if self._is_right(half, c, inputs[0], wanted)]
        return race(right, default, lambda each: self._gemm_us(half, each, inputs)).winner

    def _gemm_us(self, half: int, config: TileConfig, inputs: Sequence[_Inputs]) -> float:
        return sum(self.bench.us(partial(self._gemm, half, config, each)) for each in inputs)

    def _layer_us(self, tiles: LayerTiles, inputs: Sequence[_Inputs]) -> float:
        return sum(
            self.bench.us(
                partial(moe, i.hidden, self.experts, i.indices, i.weights, tiles.up, tiles.down)
            )
            for i in inputs
        )

    def _gemm(self, half: int, config: TileConfig, given: _Inputs) -> Tensor:
        if half == 0:
            return grouped_gemm(
                given.hidden, self.experts.gate_up, given.routing, (Variant(config),)
            )
        scale = given.weights.reshape(-1)
        return grouped_gemm(
            given.gated, self.experts.down, given.routing, (Variant(config),), scale
        )

    def _is_right(self, half: int, config: TileConfig, given: _Inputs, wanted: Tensor) -> bool:
        """Whether a configuration runs here and computes what plain torch does, up to rounding."""
        try:
            found = self._gemm(half, config, given).float()
        except (TritonError, UsageFault, RuntimeError):  # more than this device has, for one
            return False
        bound = torch.finfo(given.hidden.dtype).eps + torch.finfo(torch.float32).eps * math.sqrt(
            self.experts.gate_up.shape[2]
        )
        return bool((found - wanted).norm() <= bound * wanted.norm())

    def _wanted(self, half: int, given: _Inputs) -> Tensor:
        """Return what a GEMM should give, expert by expert in float32."""
        slots, top_k = given.routing.slots, self.shape.top_k
        rows = given.hidden[slots // top_k] if half == 0 else given.gated
        weight = self.experts.gate_up if half == 0 else self.experts.down
        bounds = itertools.pairwise(given.routing.rows.tolist())
        parts = [
            rows[first:last].float() @ weight[expert].float().T
            for expert, (first, last) in enumerate(bounds)
        ]
        found = torch.cat(parts)
        return found if half == 0 else found * given.weights.reshape(-1)[slots, None].float()
