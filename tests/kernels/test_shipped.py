"""What is shipped without a GPU: what compiled well and is predicted best with its true needs."""

from __future__ import annotations

import math

import pytest

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.cost_model import Resources, estimate, predict
from ditune.kernels.gemm import Gemm
from ditune.kernels.hardware import GPUS
from ditune.kernels.shipped import choose
from ditune.kernels.tile_space import DEFAULT

GEMM = Gemm(8, 4096, 4096, 2, "bfloat16", gather=False)
GPU = GPUS["h100"]
MANY, FEW = (1024,) * 8, (8,) * 8


def as_estimated(config: TileConfig) -> Resources:
    return estimate(config, "bfloat16", 90)


def test_each_histogram_gets_its_best() -> None:
    found = choose(GEMM, [[MANY], [FEW]], GPU, as_estimated)
    many, few = found.best
    assert not found.dropped
    assert many.config.block_m == 128
    assert few.config.block_m < 128
    for shipped, counts in ((many, MANY), (few, FEW)):
        assert shipped.us == min(
            predict(GEMM, counts, kept.config, GPU).us for kept in found.sieved.kept
        )
        assert shipped.us <= shipped.default_us == predict(GEMM, counts, DEFAULT, GPU).us


def test_a_group_gets_what_loses_least_under_all_of_it() -> None:
    found = choose(GEMM, [[MANY, FEW]], GPU, as_estimated)
    times = {
        kept.config: [predict(GEMM, counts, kept.config, GPU).us for counts in (MANY, FEW)]
        for kept in found.sieved.kept
    }
    least = [min(column) for column in zip(*times.values(), strict=True)]
    losses = {c: us[0] / least[0] + us[1] / least[1] for c, us in times.items()}
    best = found.best[0]
    assert losses[best.config] == min(losses.values())
    assert best.us == sum(times[best.config]) / 2


def test_true_registers_overrule_the_estimate() -> None:
    first = choose(GEMM, [[MANY]], GPU, as_estimated).best[0].config

    def hungry(config: TileConfig) -> Resources:
        found = as_estimated(config)
        wide = config.block_m * config.block_n == first.block_m * first.block_n
        return Resources(255 if wide else found.registers, 230_000 if wide else found.shared_bytes)

    found = choose(GEMM, [[MANY]], GPU, hungry)
    best = found.best[0]
    expected = predict(GEMM, MANY, best.config, GPU, hungry(best.config))
    assert (best.us, best.resources) == (expected.us, hungry(best.config))
    times = [
        predict(GEMM, MANY, kept.config, GPU, hungry(kept.config)).us for kept in found.sieved.kept
    ]
    assert best.us == min(times)


def test_what_the_compiler_speaks_against_is_dropped_with_its_words() -> None:
    def strict(config: TileConfig) -> Resources:
        if config.path != "ptr":
            raise UsageFault("reads by pointers where TMA was expected")
        if config == DEFAULT:
            return Resources(168, 300_000)  # over the limit of a program
        return as_estimated(config)

    found = choose(GEMM, [[MANY]], GPU, strict)
    assert found.best[0].config.path == "ptr"
    assert math.isinf(found.best[0].default_us)
    assert "300000" in found.dropped.pop(DEFAULT)
    assert {"reads by pointers where TMA was expected"} == set(found.dropped.values())
    assert all(config.path != "ptr" for config in found.dropped)


def test_nothing_left_is_an_error_that_says_why() -> None:
    def spills(config: TileConfig) -> Resources:
        raise UsageFault("spills 472 bytes")

    with pytest.raises(UsageFault, match=r"none of .* compiled well for h100.*spills 472 bytes"):
        choose(GEMM, [[MANY]], GPU, spills)


def test_a_histogram_without_rows_is_refused() -> None:
    with pytest.raises(UsageFault, match="has no rows"):
        choose(GEMM, [[MANY, (0,) * 8]], GPU, as_estimated)
