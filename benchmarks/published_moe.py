"""Times of MoE kernels that others measured and published, and how far the cost model is off them.

Four sets from pull requests of vLLM: #24700 (H100), #44818 (H200) and #40542 (A100) are whole
layers, #44152 (H20) is one GEMM. Tuned configurations were published with the first two; for the
others the model's own best of a small grid stands in. Routing was near uniform, so what is drawn
here is too: skew is not checked by these.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ditune.db.moe import LayerTiles, MoeShape, TileConfig
from ditune.kernels.cost_model import between_us, predict, predict_layer
from ditune.kernels.gemm import Gemm, layer_gemms
from ditune.kernels.hardware import GPUS, Gpu
from ditune.kernels.tile_space import grid

Tile = tuple[int, int, int, int, int, int]  # block_m, block_n, block_k, group_m, warps, stages


@dataclass(frozen=True)
class Point:
    """One published time.

    Args:
        source: The set it belongs to, by the pull request's number.
        gpu: What it was measured on.
        shape: Of the layer.
        whole: Whether the time is of the layer; else of its first GEMM, as wide as its two halves.
        tokens: Of the call.
        us: The time.
        tile: What both GEMMs were tiled by; None where it was not published.
    """

    source: str
    gpu: Gpu
    shape: MoeShape
    whole: bool
    tokens: int
    us: float
    tile: TileConfig | None

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        """What the time is of."""
        return layer_gemms(self.shape) if self.whole else layer_gemms(self.shape)[:1]

    def counts(self) -> tuple[int, ...]:
        """Return rows of each expert, from experts that were drawn with a fixed seed."""
        return uniform_counts(self.tokens, self.shape.experts, self.shape.top_k)

    def predicted_us(self) -> float:
        """Return the model's time, under the published tiles or its own best."""
        counts = self.counts()
        if self.tile is not None:
            return predict_layer(
                self.shape, counts, LayerTiles(up=self.tile, down=self.tile), self.gpu
            )
        best = sum(
            min(predict(gemm, counts, tile, self.gpu).us for tile in _small_grid())
            for gemm in self.gemms
        )
        rows = self.tokens * self.shape.top_k
        return best + (between_us(self.shape, rows, self.gpu) if self.whole else 0.0)


@functools.cache
def uniform_counts(tokens: int, experts: int, top_k: int) -> tuple[int, ...]:
    """Return rows of each expert where each token has drawn `top_k` different ones, all alike."""
    source = random.Random(0)
    drawn = Counter(e for _ in range(tokens) for e in source.sample(range(experts), top_k))
    return tuple(drawn[expert] for expert in range(experts))


def error_factor(points: Sequence[Point], fewest: int = 8) -> float:
    """Return the geometric mean of how many times too long or too short the model's times are.

    Args:
        points: Published times.
        fewest: Tokens; calls with fewer are left out, because a floor of the harness shows there.
    """
    logs = [abs(math.log(p.predicted_us() / p.us)) for p in points if p.tokens >= fewest]
    return math.exp(sum(logs) / len(logs))


def grid_best_us(gemm: Gemm, counts: Sequence[int], gpu: Gpu) -> float:
    """Return the best prediction of the whole grid, without what can only look good.

    Left out are tiles whose sums do not fit into registers, which spill, and a depth that is split
    although there are tiles for every SM. Other paths than pointers have the same times.
    """

    def plain(config: TileConfig) -> bool:
        tiles = math.ceil(gemm.n / config.block_n)
        tiles *= sum(math.ceil(count / config.block_m) for count in counts)
        holds = config.block_m * config.block_n <= 128 * 32 * config.num_warps
        return config.path == "ptr" and holds and (config.split_k == 1 or tiles < gpu.sms)

    return min(predict(gemm, counts, config, gpu).us for config in filter(plain, grid(gemm, gpu)))


def tile(values: Tile) -> TileConfig:
    """Return a configuration from its published figures."""
    names = ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages")
    return TileConfig.model_validate(dict(zip(names, values, strict=True)))


@functools.cache
def _small_grid() -> tuple[TileConfig, ...]:
    sizes = itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (64, 128), (1, 16), (4, 8), (2, 3, 4, 5)
    )
    return tuple(tile(values) for values in sizes)


def _layer(experts: int, inner: int, hidden: int, top_k: int) -> MoeShape:
    return MoeShape(experts=experts, hidden=hidden, inner=inner, top_k=top_k, dtype="bfloat16")


_H100: dict[int, tuple[float, Tile]] = {  # vLLM #24700: tokens, us, tile
    1: (144, (16, 64, 128, 64, 4, 4)),
    2: (229, (16, 128, 128, 32, 8, 4)),
    4: (351, (16, 32, 256, 16, 4, 4)),
    8: (435, (16, 128, 128, 32, 8, 4)),
    16: (472, (16, 128, 128, 1, 4, 4)),
    32: (487, (16, 128, 128, 1, 4, 4)),
    64: (483, (32, 128, 128, 1, 4, 4)),
    128: (491, (64, 128, 128, 1, 4, 4)),
    256: (537, (64, 128, 128, 64, 4, 4)),
    512: (662, (64, 256, 64, 32, 4, 4)),
    1024: (834, (128, 256, 64, 16, 8, 4)),
    1536: (1123, (128, 256, 64, 64, 8, 4)),
}
_H200: dict[int, tuple[float, Tile]] = {  # vLLM #44818
    1: (185, (16, 256, 128, 1, 8, 2)),
    8: (204, (16, 64, 128, 1, 4, 4)),
    16: (264, (16, 64, 128, 64, 4, 4)),
    32: (325, (16, 64, 128, 1, 4, 4)),
    64: (384, (16, 128, 64, 1, 8, 4)),
    128: (396, (16, 64, 128, 16, 4, 4)),
    256: (420, (32, 64, 128, 16, 4, 4)),
    512: (442, (64, 128, 64, 16, 4, 3)),
    1024: (528, (64, 128, 64, 1, 4, 3)),
    2048: (728, (128, 256, 64, 1, 8, 4)),
    4096: (1190, (128, 256, 64, 1, 8, 3)),
}
_A100 = {1: 184, 4: 266, 16: 523, 64: 678, 256: 717, 1024: 930, 4096: 2637}  # vLLM #40542
_H20 = {1: 76, 32: 279, 128: 435, 512: 1069, 2048: 3606}  # vLLM #44152


def _points() -> Iterator[Point]:
    for source, gpu, shape, tiled in (
        ("#24700", GPUS["h100"], _layer(8, 7168, 4096, 2), _H100),
        ("#44818", GPUS["h200"], _layer(128, 704, 2816, 8), _H200),
    ):
        for tokens, (us, values) in tiled.items():
            yield Point(source, gpu, shape, True, tokens, us, tile(values))
    for source, gpu, shape, whole, bare in (
        ("#40542", GPUS["a100"], _layer(64, 1408, 2048, 6), True, _A100),
        ("#44152", GPUS["h20"], _layer(8, 7168, 4096, 2), False, _H20),
    ):
        for tokens, us in bare.items():
            yield Point(source, gpu, shape, whole, tokens, us, None)


POINTS = tuple(_points())
SOURCES = tuple(dict.fromkeys(point.source for point in POINTS))
