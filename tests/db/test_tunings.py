"""Tunings of expert layers: records, rows, and the reader of the run time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from tests.db.conftest import HARDWARE, SOFTWARE

from ditune.db import readonly
from ditune.db.moe import (
    CpuTiles,
    LayerTiles,
    MoeChoice,
    MoeShape,
    MoeTuning,
    RoutingBucket,
    TileConfig,
)
from ditune.db.records import PolicyFile
from ditune.db.store import Store
from ditune.db.tunings import TunedLayer, newest

SHAPE = MoeShape(experts=8, hidden=64, inner=96, top_k=2, dtype="float32")
BUCKET = RoutingBucket(tokens=256, skew="even", active=0)
KERNELS = "sha256:" + "c" * 64
CHOICE = MoeChoice(bucket=BUCKET, tiles=CpuTiles(rows=64), status="measured", speedup=1.2)


def layer(rows: int = 128, **changes: object) -> TunedLayer:
    parts: dict[str, object] = {
        "hardware": HARDWARE,
        "software": SOFTWARE,
        "kernels": KERNELS,
        "tuning": MoeTuning(shape=SHAPE, default=CpuTiles(rows=rows), choices=(CHOICE,)),
        "created_at": "2026-01-02T03:04:05Z",
    }
    return TunedLayer.model_validate(parts | changes)


def test_a_bucket_that_nobody_tuned_has_the_default_not_its_neighbour() -> None:
    tuning = layer().tuning
    assert tuning.tiles(BUCKET) == CHOICE.tiles
    for field, value in (("tokens", 512), ("skew", "uneven"), ("active", 1)):
        assert tuning.tiles(BUCKET.model_copy(update={field: value})) == tuning.default


def test_a_tuning_takes_from_another_what_it_lacks() -> None:
    other = CHOICE.model_copy(update={"bucket": BUCKET.model_copy(update={"tokens": 512})})
    again = CHOICE.model_copy(update={"tiles": CpuTiles(rows=16)})
    older = MoeTuning(shape=SHAPE, default=CpuTiles(rows=1024), choices=(again, other))
    found = layer().tuning.and_of(older)
    assert found.choices == (CHOICE, other)
    assert found.default == layer().tuning.default


def test_buckets_end_at_powers_of_two_and_have_one_choice() -> None:
    with pytest.raises(ValidationError, match="power of two"):
        RoutingBucket(tokens=100, skew="even", active=0)
    with pytest.raises(ValidationError, match="some have two"):
        MoeTuning(shape=SHAPE, default=CpuTiles(), choices=(CHOICE, CHOICE))


def test_tiles_of_both_kinds_come_back_as_they_were() -> None:
    for tiles in (CpuTiles(rows=32), LayerTiles(down=TileConfig(block_m=16))):
        tuning = MoeTuning(shape=SHAPE, default=tiles)
        assert MoeTuning.model_validate_json(tuning.model_dump_json()) == tuning


def test_the_newest_tuning_comes_first_in_the_store_and_without_it(database: Path) -> None:
    elsewhere = HARDWARE.model_copy(update={"device_name": "Another"})
    with Store.open(str(database)) as store:
        for each in (layer(32), layer(64), layer(16, hardware=elsewhere)):
            store.moe.save(each)
        assert store.moe.of(HARDWARE) == [layer(64), layer(32)]
    assert readonly.find_tunings(database, HARDWARE) == [layer(64), layer(32)]
    assert readonly.find_tunings(database.with_name("none.db"), HARDWARE) == []


@pytest.mark.parametrize(
    ("version", "other", "default"),
    [("torch", "triton", CpuTiles()), ("triton", "torch", LayerTiles())],
)
def test_what_other_versions_compiled_is_not_used(
    version: str, other: str, default: CpuTiles | LayerTiles
) -> None:
    tuning = MoeTuning(shape=SHAPE, default=default)
    old = layer(tuning=tuning, software=SOFTWARE.model_copy(update={version: "1.0"}))
    found, why = newest([old], SHAPE, SOFTWARE, KERNELS)
    assert found is None
    assert f"{version} 1.0 (here {getattr(SOFTWARE, version)})" in why
    assert newest([old, layer(64)], SHAPE, SOFTWARE, KERNELS) == (layer(64).tuning, "")
    fitting = layer(tuning=tuning, software=SOFTWARE.model_copy(update={other: "1.0"}))
    assert newest([fitting], SHAPE, SOFTWARE, KERNELS) == (tuning, "")


def test_other_kernels_and_other_shapes_are_not_used() -> None:
    assert newest([layer()], SHAPE, SOFTWARE, "sha256:" + "d" * 64) == (
        None,
        "it was tuned with other kernels",
    )
    wider = SHAPE.model_copy(update={"hidden": 128})
    assert newest([layer()], wider, SOFTWARE, KERNELS)[0] is None


def test_other_releases_of_diffusers_change_no_kernel() -> None:
    newer = SOFTWARE.model_copy(update={"diffusers": "0.99", "transformers": "9", "ditune": "9"})
    assert newest([layer(64)], SHAPE, newer, KERNELS)[0] == layer(64).tuning


def test_policies_of_a_database_stay_as_they_are(
    database: Path, make_file: Callable[..., PolicyFile]
) -> None:
    wanted = make_file()
    with Store.open(str(database)) as store:
        store.save_and_activate(wanted)
        store.moe.save(layer())
    found = readonly.find(database, wanted.hardware, wanted.software, wanted.workload)
    assert found.policy_id == wanted.policy_id


def test_a_server_keeps_tunings_too(server_database: str) -> None:
    with Store.open(server_database) as store:
        for each in (layer(32), layer(64)):
            store.moe.save(each)
        assert store.moe.of(HARDWARE) == [layer(64), layer(32)]
