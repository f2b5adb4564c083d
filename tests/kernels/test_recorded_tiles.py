"""Shipped tiles compile to what was recorded; `benchmarks.moe_compiled` checks all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import moe_compiled
from benchmarks.moe_compiled import (
    RECORD,
    RENEWAL,
    Kernel,
    balanced,
    differences,
    recorded,
)
from benchmarks.moe_offline import GPU, SIZES

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.hardware import SHARED_LIMITS
from ditune.kernels.tile_space import sieve
from ditune.tuner.moe_offline import COMPILED

HALVES = [(layer, half) for layer in SIZES for half in ("up", "down")]
Record = dict[Kernel, dict[str, object]]


@pytest.fixture(scope="module")
def record() -> Record:
    return recorded()


@pytest.mark.slow
def test_some_tiles_compile_to_what_was_recorded(record: Record) -> None:
    layer, half = HALVES[-1]
    some = [k for k in record if (k.layer, k.half) == (layer, half)]
    assert len(some) == len(SHARED_LIMITS) + 1
    found = [words for kernel in some for words in differences(kernel, record[kernel])]
    assert not found, "\n".join(found)


def test_the_record_has_every_layer_and_nothing_that_spills(record: Record) -> None:
    default = {(k.layer, k.half, k.arch) for k in record if not k.picked}
    assert default == {(*half, arch) for half in HALVES for arch in SHARED_LIMITS}
    assert [(k.layer, k.half) for k in record if k.picked] == HALVES
    changed = [k.name for k in record if not k.picked and k.config != TileConfig()]
    assert not changed, f"the default is another one now; run {RENEWAL}"
    for kernel, figures in record.items():
        assert figures["spill_bytes"] == 0, kernel.name
    assert {figures["mma"] for k, figures in record.items() if k.picked} == {"HGMMA"}


@pytest.mark.parametrize(("layer", "half"), HALVES)
def test_what_was_picked_is_still_tried(record: Record, layer: str, half: str) -> None:
    (picked,) = (k for k in record if k.picked and (k.layer, k.half) == (layer, half))
    kept = sieve(picked.gemm, [balanced(picked.gemm)], GPU, COMPILED).kept
    assert picked.config in [each.config for each in kept], f"others are tried; run {RENEWAL}"


def test_a_difference_is_a_sentence_that_names_it(record: Record) -> None:
    first = next(iter(record))
    wanted = record[first]
    (words,) = differences(first, {**wanted, "registers": 77})
    assert words.startswith(f"{first.name}: registers is {wanted['registers']} and was 77; if")
    large = replace(first, arch=86, config=TileConfig(num_stages=5))
    said = list(differences(large, wanted))
    assert any("shared_bytes is 131072 and was 65536" in each for each in said)
    assert any("pass the 101376 of sm_86" in each for each in said)


def test_a_record_of_another_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / RECORD.name
    found = json.loads(RECORD.read_text()) | {"triton": "2.0.0"}
    other.write_text(json.dumps(found))
    monkeypatch.setattr(moe_compiled, "RECORD", other)
    with pytest.raises(UsageFault, match=r"triton 2\.0\.0 compiled and this is triton"):
        recorded()
