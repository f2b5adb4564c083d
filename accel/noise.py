"""What a scheduler's noise levels are, and what a model's output says of the clean latents."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

Prediction = Literal["flow", "velocity", "noise", "sample"]
_TYPES: dict[str, Prediction] = {
    "flow_prediction": "flow",
    "v_prediction": "velocity",
    "epsilon": "noise",
    "sample": "sample",
}


def prediction_of(scheduler: Any) -> Prediction:
    """Return what a scheduler takes a model's output for; flow where it says nothing."""
    return _TYPES.get(str(getattr(scheduler.config, "prediction_type", None)), "flow")


def denoised(latents: Tensor, output: Tensor, sigma: float, prediction: Prediction) -> Tensor:
    """Return the estimate of the clean latents that an output stands for.

    Args:
        latents: What the model was given.
        output: What it said, guided.
        sigma: The noise level: of flow matching in [0, 1], else the ratio of noise to signal.
        prediction: What the output is.
    """
    if prediction == "sample":
        return output
    if prediction == "flow":
        return latents - sigma * output
    signal = 1.0 / math.sqrt(1.0 + sigma**2)
    noise = sigma * signal
    if prediction == "velocity":
        return signal * latents - noise * output
    return (latents - noise * output) / signal


def tells_ratios(scheduler: Any) -> bool:
    """Whether noise levels are ratios of noise to signal, not flow matching's shares in [0, 1].

    Cosmos steps a flow matching scheduler over ratios: its greatest level says so.
    """
    config = scheduler.config
    if prediction_of(scheduler) == "flow":
        return bool((config.get("sigma_max") or 1.0) > 1.0)
    return not config.get("use_flow_sigmas")
