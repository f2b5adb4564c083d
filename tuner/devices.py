"""Devices that latencies are measured on: their names, and who else computes on them."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch

from ditune.db.errors import NotMeasurable


def device_name(device: torch.device) -> str:
    """Return a name that no device of another machine has."""
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return f"{socket.gethostname()}/{device.type}"


def require_alone(device: str, own: int | None = None) -> None:
    """Refuse to measure beside programs of others.

    On a CPU there are always some, and pairs that are interleaved even them out. Where NVML is
    missing or may not be asked, nothing is known and nothing is refused.

    Args:
        device: As `device_name` gives it.
        own: The process that may compute there besides this one: the child.

    Raises:
        NotMeasurable: Other processes compute on the device.
    """
    if not device.startswith("GPU-"):
        return
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(device)
        seen = {process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    except pynvml.NVMLError:
        return
    refuse_foreign(device, seen - {own, os.getpid()})


def refuse_foreign(device: str, foreign: set[Any]) -> None:
    """Say which processes disturb a measurement, if there are any."""
    if foreign:
        listed = ", ".join(str(pid) for pid in sorted(foreign)[:5])
        raise NotMeasurable(
            f"other processes compute on {device} (pid {listed}): latencies taken beside them mean "
            "nothing; end them, or run on another device"
        )
