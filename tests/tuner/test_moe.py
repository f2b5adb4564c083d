"""Routings that layers are tuned for, what is predicted for a GPU, and what is stored of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.db.conftest import HARDWARE

from ditune.accel.versions import software
from ditune.db.errors import UsageFault
from ditune.db.moe import CpuTiles, LayerTiles, MoeChoice, MoeShape, RoutingBucket
from ditune.db.store import Store
from ditune.db.tunings import newest
from ditune.kernels.digest import kernels_digest
from ditune.kernels.hardware import GPUS
from ditune.tuner.moe import Tuned, by_bucket, by_tokens, keep, kinds_of_routing, read_routings
from ditune.tuner.moe_offline import predicted

SHAPE = MoeShape(experts=8, hidden=256, inner=512, top_k=2, dtype="bfloat16")


def test_routings_are_made_for_each_number_of_tokens_and_fall_into_buckets() -> None:
    routed = kinds_of_routing(SHAPE, (64, 100, 128), ("balanced", "best"))
    assert [each.name for each in routed[:2]] == ["balanced, 64 tokens", "best, 64 tokens"]
    assert all(sum(each.counts) == 2 * each.tokens for each in routed)
    buckets = by_bucket(routed)
    assert {bucket.tokens for bucket in buckets} == {64, 128}
    assert {len(group) for bucket, group in buckets.items() if bucket.tokens == 128} == {2}
    assert [list(each) for each in by_tokens(routed)] == [
        [b for b in buckets if b.tokens == tokens] for tokens in (64, 128)
    ]


def test_routings_of_a_file_are_what_was_recorded(tmp_path: Path) -> None:
    file = tmp_path / "routings.json"
    file.write_text(json.dumps({"step 10": [4, 4, 4, 4, 4, 4, 4, 4], "step 11": [8, 8] + [0] * 6}))
    first, second = read_routings(file, SHAPE)
    assert (first.name, first.tokens, second.counts) == ("step 10", 16, (8, 8, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[1, 2]]", "must hold an object"),
        ("{", "cannot read routings"),
        ('{"a": [1, 1]}', "'a' must be 8 whole numbers"),
        ('{"a": [1, 1, 1, 1, 1, 1, 1, -1]}', "'a' must be 8 whole numbers"),
        ('{"a": [1.5, 0.5, 0, 0, 0, 0, 0, 0]}', "'a' must be 8 whole numbers"),
        ('{"a": [1, 0, 0, 0, 0, 0, 0, 0]}', "has 1 rows"),
        ('{"a": [0, 0, 0, 0, 0, 0, 0, 0]}', "has 0 rows"),
        ('{"a": [5, 1, 0, 0, 0, 0, 0, 0]}', "the most 5 on one expert"),
    ],
)
def test_a_file_that_fits_no_layer_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "routings.json"
    file.write_text(text)
    with pytest.raises(UsageFault, match=words):
        read_routings(file, SHAPE)


def test_tiles_are_predicted_for_a_gpu_that_is_elsewhere_and_compiled_for_it() -> None:
    said: list[str] = []
    routed = kinds_of_routing(SHAPE, (64,), ("balanced", "worst"))
    found = predicted(SHAPE, routed, GPUS["a100"], said.append, compiled=2)
    assert [each.routings for each in found] == [("balanced, 64 tokens",), ("worst, 64 tokens",)]
    assert [each.choice.bucket for each in found] == [each.bucket for each in routed]
    for each in found:
        assert each.choice.status == "compiled"
        assert each.choice.speedup >= 1.0
        assert each.us > 0.0
        assert isinstance(each.choice.tiles, LayerTiles)
        assert each.note.split(", ")[-1].endswith("after kept")
    assert [words.partition(":")[0] for words in said] == ["up to 64 tokens"] * 2


def found_for(tokens: int, rows: int) -> Tuned:
    bucket = RoutingBucket(tokens=tokens, skew="even", active=0)
    choice = MoeChoice(bucket=bucket, tiles=CpuTiles(rows=rows), status="measured", speedup=1.1)
    return Tuned(choice, ("balanced",), 1.0, "")


def test_what_is_found_later_joins_what_is_known_and_replaces_it(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "own.db")) as store:
        keep(store.moe, HARDWARE, SHAPE, [found_for(64, 32), found_for(128, 32)])
        keep(store.moe, HARDWARE, SHAPE, [found_for(128, 512), found_for(256, 512)])
        tuning, why = newest(store.moe.of(HARDWARE), SHAPE, software(), kernels_digest())
    assert tuning is not None, why
    rows = {c.bucket.tokens: c.tiles for c in tuning.choices}
    assert rows == {64: CpuTiles(rows=32), 128: CpuTiles(rows=512), 256: CpuTiles(rows=512)}
