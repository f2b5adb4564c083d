from __future__ import annotations

import pytest
from tests.tuner.test_search import profile

from ditune.db.records import LayerTiming
from ditune.profiler.parts import Parts, parts_of, speedup_of_work


def layer(name: str, median_ms: float, n: int) -> LayerTiming:
    return LayerTiming(name=name, median_ms=median_ms, p20_ms=1, p80_ms=9, n=n)


def test_what_no_layer_accounts_for_is_the_rest() -> None:
    layers = (layer("text_encoder", 5, 2), layer("transformer", 2, 40), layer("vae.decoder", 4, 1))
    found = parts_of(profile().model_copy(update={"total_ms": 100.0, "layers": layers}))
    assert found == Parts(10.0, 80.0, 4.0, 6.0)
    slow_clocks = profile().model_copy(update={"total_ms": 47.0, "layers": layers})
    assert parts_of(slow_clocks) == Parts(5.0, 40.0, 2.0, 0.0)


def test_a_profile_without_the_transformer_has_no_parts() -> None:
    assert parts_of(profile()) is None


def test_only_the_transformers_share_shrinks() -> None:
    parts = Parts(10.0, 80.0, 4.0, 6.0)
    assert speedup_of_work(parts, 1.0) == 1.0
    assert speedup_of_work(parts, 4.0) == pytest.approx(100.0 / 40.0)
    assert speedup_of_work(Parts(0.0, 80.0, 0.0, 0.0), 4.0) == pytest.approx(4.0)
