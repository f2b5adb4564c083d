"""A whole search on a device: profile, trials, proof, database, lookup."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditune.accel.apply import accelerate
from ditune.accel.fingerprint import detect
from ditune.miniature.system import MiniatureSource
from ditune.tuner.live import tune


@pytest.mark.gpu
@pytest.mark.slow
def test_what_is_found_on_a_device_is_applied_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITUNE_DB", str(tmp_path / "policies.db"))
    source = MiniatureSource()
    source.pipe.to("cuda")
    source.call["num_inference_steps"] = 24
    prompts = [*source.calibration[:8], *source.held_out[:8]]
    policy = tune(
        source.pipe, prompts, quality="psnr>=25,psnr_worst>=17", call=source.call, trials=6
    )
    assert policy.cache is not None
    hardware, _, _ = detect(source.pipe, source.call)
    assert hardware.device_name == torch.cuda.get_device_name()
    with accelerate(source.pipe) as applied:
        source.pipe(prompt=prompts[0], **source.call)
        assert applied.summary().steps["full"] < 24
