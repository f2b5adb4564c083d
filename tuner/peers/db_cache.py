"""cache-dit's DBCache: alone, with its TaylorSeer calibrator, and with its step masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

from ditune.accel.anatomy import denoisers
from ditune.accel.spans import BlockStack
from ditune.db.errors import UsageFault
from ditune.tuner.peers.contract import Setting
from ditune.tuner.source import Source

_THRESHOLDS = (0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.35)
_FRONT = 8  # front blocks that always run, cache-dit's default; fewer in shallow models
_WARMUP = 4
_PERIODS = (2, 3, 4, 5, 6, 8)


def thresholds(source: Source) -> list[Setting]:
    """Return DBCache with its threshold and its front blocks swept."""
    depth = len(BlockStack(denoisers(source.pipe)[0]))
    fronts = (1, max(2, min(_FRONT, depth // 2)))
    return [
        Setting(
            f"F{front}, threshold {t:g}",
            partial(_on, config={"Fn_compute_blocks": front, "residual_diff_threshold": t}),
        )
        for front, t in product(fronts, _THRESHOLDS)
    ]


def forecasts(source: Source) -> list[Setting]:
    """Return DBCache with one front block and a TaylorSeer calibrator of order 1 and 2."""
    return [
        Setting(
            f"F1, threshold {t:g}, order {order}",
            partial(
                _on, config={"Fn_compute_blocks": 1, "residual_diff_threshold": t}, order=order
            ),
        )
        for order, t in product((1, 2), _THRESHOLDS)
    ]


def masks(source: Source) -> list[Setting]:
    """Return its static step masks, every n-th step computed, alone and with a calibrator."""
    steps = int(source.call["num_inference_steps"])
    found = []
    for period, order in product(_PERIODS, (0, 1, 2)):
        computed = [int(step < _WARMUP or (step - _WARMUP) % period == 0) for step in range(steps)]
        config = {
            "Fn_compute_blocks": 1,
            "num_inference_steps": steps,
            "steps_computation_mask": computed,
            "steps_computation_policy": "static",
        }
        label = f"F1, every {period}. step" + (f", order {order}" if order else "")
        found.append(Setting(label, partial(_on, config=config, order=order)))
    return found


@contextmanager
def _on(pipe: Any, config: Mapping[str, Any], order: int = 0) -> Iterator[Mapping[str, Any]]:
    try:
        import cache_dit
    except ImportError as fault:
        raise UsageFault(
            'cache-dit is not installed: run pip install "ditune[peers]" to measure it'
        ) from fault
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    settings = cache_dit.DBCacheConfig(max_warmup_steps=_WARMUP, **config)
    cache_dit.enable_cache(pipe, cache_config=settings, calibrator_config=calibrator)
    try:
        yield {}
    finally:
        cache_dit.disable_cache(pipe)
