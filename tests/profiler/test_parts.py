from __future__ import annotations

import pytest
from tests.tuner.test_search import profile

from ditune.db.records import LayerTiming
from ditune.profiler.parts import Parts, forwards_of, parts_of, speedup_of_work
from ditune.profiler.timing import OUTSIDE


def layer(name: str, median_ms: float, n: int) -> LayerTiming:
    return LayerTiming(name=name, median_ms=median_ms, p20_ms=1, p80_ms=9, n=n)


def test_parts_share_a_call_as_they_shared_the_one_with_clocks() -> None:
    """The call with clocks may run at another speed than those without: gaps must not grow."""
    layers = (
        layer("text_encoder", 5, 2),
        layer("transformer", 2, 40),
        layer("vae.decoder", 4, 1),
        layer(OUTSIDE, 6, 1),
    )
    for total_ms in (100.0, 50.0, 300.0):
        found = parts_of(profile().model_copy(update={"total_ms": total_ms, "layers": layers}))
        share = total_ms / 100.0
        assert found == Parts(10.0 * share, 80.0 * share, 4.0 * share, 6.0 * share)


def test_a_profile_without_the_transformer_has_no_parts() -> None:
    assert parts_of(profile()) is None


def test_forwards_are_those_of_all_denoisers() -> None:
    layers = (
        layer("transformer", 2, 30),
        layer("transformer_2", 2, 10),
        layer("vae.decoder", 4, 9),
    )
    assert forwards_of(profile().model_copy(update={"layers": layers})) == 40
    assert forwards_of(profile().model_copy(update={"layers": ()})) == 1


def test_only_the_transformers_share_shrinks() -> None:
    parts = Parts(10.0, 80.0, 4.0, 6.0)
    assert speedup_of_work(parts, 1.0) == 1.0
    assert speedup_of_work(parts, 4.0) == pytest.approx(100.0 / 40.0)
    assert speedup_of_work(Parts(0.0, 80.0, 0.0, 0.0), 4.0) == pytest.approx(4.0)
