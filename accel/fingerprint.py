"""Which hardware, software and workload this is: the keys that policies are stored under."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditune.accel.anatomy import denoisers
from ditune.accel.internals import active_attention_backend, is_compiled
from ditune.accel.request import Request, declared
from ditune.accel.versions import software
from ditune.db.digest import digest_bytes
from ditune.db.records import Hardware, Software, Workload

__all__ = ["detect", "hardware", "software", "workload"]
_GIB = 1 << 30
_SAMPLED_TENSORS = 64  # how many weight tensors the revision looks at
_SAMPLED_VALUES = 64  # and how many values of each


def detect(
    pipe: Any = None, call: Mapping[str, Any] | None = None, small: Any = None
) -> tuple[Hardware, Software, Workload | None]:
    """Return the fingerprint of this machine and, for a pipeline, of a call to it.

    Args:
        pipe: A diffusers pipeline; without one there is no workload and no device to follow.
        call: The arguments that the pipeline will be called with; its defaults fill the rest.
        small: The small model of the family, or its pipeline, for the key of policies that hand
            over to it.
    """
    if pipe is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return hardware(device), software(), None
    model = denoisers(pipe)[0]
    device = next(model.parameters()).device
    return hardware(device), software(), workload(pipe, declared(pipe, call or {}), small)


# --- hardware -------------------------------------------------------------------


def hardware(device: torch.device) -> Hardware:
    """Return the fingerprint of a device."""
    return _cuda(device) if device.type == "cuda" else _cpu()


def _cpu() -> Hardware:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        device_name=_cpu_name(),
        kind="cpu",
        capability=capability,
        cores=min(cores or 1, torch.get_num_threads()),
        memory_bytes=max(1, round(memory / _GIB)) * _GIB,  # kernels reserve a varying bit
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda(device: torch.device) -> Hardware:
    properties = torch.cuda.get_device_properties(device)
    board = _nvml(device)
    return Hardware(
        device_name=properties.name,
        kind="cuda",
        capability=f"{properties.major}.{properties.minor}",
        cores=properties.multi_processor_count,
        memory_bytes=max(1, round(properties.total_memory / _GIB)) * _GIB,
        power_limit_w=board.get("power_limit_w"),
        mig_profile=board.get("mig_profile"),
        driver=board.get("driver"),
        cuda_runtime=torch.version.cuda,
    )


def _nvml(device: torch.device) -> dict[str, Any]:
    """Return what only NVML knows; empty where it is missing or forbids the question."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        found: dict[str, Any] = {"driver": pynvml.nvmlSystemGetDriverVersion()}
        found["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000.0
        if pynvml.nvmlDeviceIsMigDeviceHandle(handle):
            found["mig_profile"] = pynvml.nvmlDeviceGetName(handle)
    except pynvml.NVMLError:
        return {}
    return found


# --- workload --------------------------------------------------------------------------------


def workload(pipe: Any, request: Request, small: Any = None) -> Workload:
    """Return the key of a request to a pipeline, with a small model if a hand-off is possible."""
    model = denoisers(pipe)[0]
    small = getattr(small, "transformer", small)
    shift = pipe.scheduler.config.get("shift", pipe.scheduler.config.get("flow_shift"))
    quantisation = getattr(model, "quantization_method", None)
    parameter = next(model.parameters())
    return Workload(
        pipeline_class=type(pipe).__name__,
        transformer_class=type(model).__name__,
        model_digest=config_digest(model),
        model_revision=weights_revision(model),
        small_model_digest=config_digest(small) if small is not None else None,
        small_model_revision=weights_revision(small) if small is not None else None,
        dtype=str(parameter.dtype).removeprefix("torch."),
        quantisation=str(quantisation) if quantisation else None,
        height=request.height,
        width=request.width,
        frames=request.frames,
        steps=request.steps,
        scheduler_class=type(pipe.scheduler).__name__,
        scheduler_shift=None if shift is None else float(shift),
        guidance=request.guidance,
        batch=request.batch,
        attention_backend=active_attention_backend(),
        compile_mode="compiled" if is_compiled(model) else None,
    )


def config_digest(model: Any) -> str:
    """Return the digest of a model's configuration, without the versions that wrote it."""
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    return digest_bytes(json.dumps(config, sort_keys=True, default=str).encode())


def weights_revision(model: nn.Module) -> str:
    """Return a short digest of a sample of the weights; fine-tunes of one model differ in it.

    Reads at most 64 values of 64 tensors, so it costs milliseconds on any model.
    """
    tensors = list(model.state_dict().items())
    chosen = tensors[:: max(1, len(tensors) // _SAMPLED_TENSORS)][:_SAMPLED_TENSORS]
    seen = hashlib.sha256()
    for name, tensor in chosen:
        seen.update(name.encode())
        if not tensor.is_meta:
            head = tensor.detach().flatten()[:_SAMPLED_VALUES]
            seen.update(head.to("cpu", torch.float32).numpy().tobytes())
    return "sampled-" + seen.hexdigest()[:16]
