"""diffusers' MagCache, calibrated on the model at hand as its documentation asks for."""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import partial
from itertools import product

import torch
from diffusers.hooks import MagCacheConfig

from ditune.db.errors import UsageFault
from ditune.tuner.peers.contract import Setting, cached
from ditune.tuner.source import Source

_THRESHOLDS = (0.003, 0.006, 0.01, 0.02, 0.04, 0.06, 0.12, 0.24)
_LONGEST = (2, 4)
_RETAINED = 0.2
_NUMBERS = re.compile(r"^\[[\d.][^\]]*\]", re.MULTILINE)


def settings(source: Source) -> list[Setting]:
    """Return its threshold and its longest run of skipped steps, around what its authors use.

    Runs one generation for the calibration.

    Raises:
        UsageFault: The calibration gave nothing.
    """
    ratios = _calibrated(source)
    steps = int(source.call["num_inference_steps"])

    def config(threshold: float, longest: int) -> MagCacheConfig:
        return MagCacheConfig(
            threshold=threshold,
            max_skip_steps=longest,
            retention_ratio=_RETAINED,
            num_inference_steps=steps,
            mag_ratios=list(ratios),
        )

    return [
        Setting(
            f"threshold {t:g}, at most {longest} in a row",
            partial(cached, config=config(t, longest)),
        )
        for longest, t in product(_LONGEST, _THRESHOLDS)
    ]


def _calibrated(source: Source) -> list[float]:
    """Return the ratios that diffusers prints, the only way in which it gives them.

    Of the lists that it prints, one per branch, the first is the conditional one.
    """
    steps = int(source.call["num_inference_steps"])
    config = MagCacheConfig(num_inference_steps=steps, calibrate=True)
    printed = io.StringIO()
    with cached(source.pipe, config), contextlib.redirect_stdout(printed):
        generator = torch.Generator().manual_seed(0)
        source.pipe(prompt=source.calibration[0], generator=generator, **source.call)
    found = _NUMBERS.search(printed.getvalue())
    if found is None:
        raise UsageFault("diffusers' MagCache printed no ratios when it was calibrated")
    return [float(value) for value in json.loads(found.group())]
