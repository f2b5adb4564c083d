"""What the cost model knows of GPUs: peaks and sizes of some, and what a device was measured to do.

Compute and bandwidth are data-sheet figures; the shares of them that kernels reach are guesses
until `calibrated` puts measured ones in their place. Whether a figure was read in a data sheet or
remembered stands beside the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from ditune.db.errors import UsageFault
from ditune.db.records import Hardware


@dataclass(frozen=True)
class Gpu:
    """One model of GPU, or one device after `calibrated`.

    Args:
        name: Short name in lower case.
        cc: Compute capability as one number, 90 for 9.0.
        sms: Streaming multiprocessors.
        mhz: Boost clock.
        teraflops: Dense bf16 peak with float32 accumulation.
        gigabytes_per_s: Peak of the device memory.
        l2_mb: Second-level cache, in 2^20 bytes.
        sm_shared_bytes: Shared memory of one SM.
        cta_shared_bytes: Most shared memory that one program may have.
        sm_warps: Most warps that live on one SM.
        memory_gib: Device memory.
        dense_share: Share of `teraflops` that a large dense GEMM reaches.
        copy_share: Share of `gigabytes_per_s` that a large copy reaches.
        launch_us: What a kernel costs that does nothing.
    """

    name: str
    cc: int
    sms: int
    mhz: float
    teraflops: float
    gigabytes_per_s: float
    l2_mb: float
    sm_shared_bytes: int
    cta_shared_bytes: int
    sm_warps: int
    memory_gib: int
    dense_share: float
    copy_share: float = 0.92
    launch_us: float = 2.5


class DeviceProperties(Protocol):
    """What is asked of a CUDA device; `torch.cuda.get_device_properties` has all of it."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    L2_cache_size: int
    shared_memory_per_multiprocessor: int
    shared_memory_per_block_optin: int


# Bytes of shared memory that a program may have, by architecture. Source: CUDA programming guide.
SHARED_LIMITS = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
_AMPERE = (164 * 1024, SHARED_LIMITS[80], 64)  # shared memory of an SM, of a program; warps per SM
_BIG = (228 * 1024, SHARED_LIMITS[90], 64)
_SMALL = (100 * 1024, SHARED_LIMITS[89], 48)

# Sources: A100, H100, H800 and L40S from data sheets, by memory; H20, B200 and RTX 4090 from public
# specification pages; H100 and H200 agree with devices that were measured (798 and 803 dense
# TFLOP/s). The share of the H20 is higher because power does not limit its clock.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 108, 1410, 312.0, 2039, 40, *_AMPERE, 80, 0.86),
        Gpu("h100", 90, 132, 1830, 989.4, 3352, 50, *_BIG, 80, 0.80),
        Gpu("h800", 90, 132, 1830, 989.4, 3352, 50, *_BIG, 80, 0.80),
        Gpu("h20", 90, 78, 1830, 148.0, 4000, 60, *_BIG, 96, 0.80 * 1.18),
        Gpu("h200", 90, 132, 1830, 989.4, 4800, 50, *_BIG, 141, 0.80),
        Gpu("b200", 100, 148, 1850, 2250.0, 7700, 126, *_BIG, 180, 0.70),
        Gpu("l40s", 89, 142, 2520, 362.0, 864, 96, *_SMALL, 48, 0.86),
        Gpu("rtx4090", 89, 128, 2520, 165.2, 1008, 72, *_SMALL, 24, 0.86),
    )
}


def gpu_named(name: str) -> Gpu:
    """Return a GPU of the table by its short name, case apart.

    Raises:
        UsageFault: The table has no such GPU.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UsageFault(
            f"the cost model has no GPU named {name!r}; it knows {', '.join(GPUS)}. Tiles for "
            "another one are timed on a machine that has it, with tune moe and without --for"
        )
    return found


def any_device(gpu: Gpu) -> Hardware:
    """Return what tiles are stored under that nobody timed: any device of a model of the table."""
    model = GPUS[gpu.name]
    return Hardware(
        device_name=f"any {model.name}",
        kind="cuda",
        capability=f"{model.cc // 10}.{model.cc % 10}",
        cores=model.sms,
        memory_bytes=model.memory_gib * 2**30,
    )


def gpu_of_device(properties: DeviceProperties) -> Gpu:
    """Return the GPU that a CUDA device is, with the sizes that the device itself reports.

    A part of a GPU, or a variant with fewer SMs, gets its share of the peak compute; the bandwidth
    of a variant is not known here: calibrate it.

    Args:
        properties: As `torch.cuda.get_device_properties` returns them.

    Raises:
        UsageFault: The device's name holds none of the table's names.
    """
    words = properties.name.lower().replace("rtx 4090", "rtx4090").replace("-", " ").split()
    name = next((word for word in words if word in GPUS), properties.name)
    return _sized(gpu_named(name), properties)


def gpu_to_calibrate(properties: DeviceProperties) -> Gpu:
    """Return the same for any CUDA device on which the kernels run.

    One that the table lacks gets what its nearest kin has by SM: wrong peaks, until it is
    calibrated. So this is for whoever measures them.

    Raises:
        UsageFault: The device is older than sm_80.
    """
    reported = 10 * properties.major + properties.minor
    known = [arch for arch in SHARED_LIMITS if arch <= reported]
    if not known:
        raise UsageFault(
            f"{properties.name} is of sm_{reported}, and the kernels need sm_80 or later: leave "
            "the model as it is on this device"
        )
    try:
        return gpu_of_device(properties)
    except UsageFault:
        arch = max(known)
        kin = min(GPUS.values(), key=lambda gpu: (_shared(gpu.cc, arch), abs(gpu.cc - arch)))
        return replace(_sized(kin, properties), name=properties.name, cc=arch)


def _shared(cc: int, arch: int) -> bool:
    """Whether programs of two architectures may have different amounts of shared memory."""
    return SHARED_LIMITS[cc] != SHARED_LIMITS[arch]


def _sized(gpu: Gpu, properties: DeviceProperties) -> Gpu:
    """Return a GPU with the sizes that a device reports."""
    sms = properties.multi_processor_count
    return replace(
        gpu,
        sms=sms,
        teraflops=gpu.teraflops * sms / gpu.sms,
        l2_mb=properties.L2_cache_size / 2**20,
        sm_shared_bytes=properties.shared_memory_per_multiprocessor,
        cta_shared_bytes=properties.shared_memory_per_block_optin,
    )


def calibrated(gpu: Gpu, teraflops: float, gigabytes_per_s: float, launch_us: float) -> Gpu:
    """Return a GPU with what was measured on the device in place of guesses.

    The peaks stay as they are: shares of the data sheet can still be told.

    Args:
        gpu: The GPU.
        teraflops: Of a large dense bf16 GEMM, > 0.
        gigabytes_per_s: Of a large copy, read and written bytes together, > 0.
        launch_us: Time of a kernel that does nothing, >= 0.

    Raises:
        UsageFault: A figure cannot be a measurement.
    """
    if not (teraflops > 0 and gigabytes_per_s > 0 and launch_us >= 0):
        raise UsageFault(
            f"{teraflops} TFLOP/s, {gigabytes_per_s} GB/s and {launch_us} us per launch cannot "
            "have been measured; time a large GEMM, a large copy and an empty kernel"
        )
    return replace(
        gpu,
        dense_share=teraflops / gpu.teraflops,
        copy_share=gigabytes_per_s / gpu.gigabytes_per_s,
        launch_us=launch_us,
    )
