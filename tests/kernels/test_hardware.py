"""GPUs by name, GPUs as devices report themselves, and measured figures in place of guesses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from ditune.db.errors import UsageFault
from ditune.kernels.hardware import GPUS, calibrated, gpu_named, gpu_of_device, gpu_to_calibrate


@dataclass
class Device:
    """What a CUDA device reports of itself."""

    name: str
    multi_processor_count: int = 132
    major: int = 9
    minor: int = 0
    L2_cache_size: int = 60 * 2**20
    shared_memory_per_multiprocessor: int = 233_472
    shared_memory_per_block_optin: int = 232_448


def test_a_gpu_is_found_by_its_name_and_an_unknown_one_is_told_what_there_is() -> None:
    assert gpu_named("H100") is GPUS["h100"]
    with pytest.raises(UsageFault, match=r"'mi300'.*a100, h100, h800, h20, h200, b200, l40s"):
        gpu_named("mi300")


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H800", "h800"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_device_is_recognised(reported: str, expected: str) -> None:
    assert gpu_of_device(Device(reported)).name == expected


@pytest.mark.parametrize("reported", ["NVIDIA L4", "NVIDIA GeForce RTX 4080", "Tesla T4"])
def test_an_unknown_device_is_refused(reported: str) -> None:
    with pytest.raises(UsageFault, match=reported):
        gpu_of_device(Device(reported))


@pytest.mark.parametrize(
    ("reported", "capability", "kin", "arch"),
    [
        ("NVIDIA GeForce RTX 3090", (8, 6), "l40s", 86),
        ("NVIDIA L4", (8, 9), "l40s", 89),
        ("NVIDIA B300", (10, 3), "b200", 100),
        ("NVIDIA GeForce RTX 5090", (12, 0), "l40s", 120),
        ("NVIDIA GH100", (9, 0), "h100", 90),
    ],
)
def test_a_device_that_the_table_lacks_has_what_its_kin_has_by_sm(
    reported: str, capability: tuple[int, int], kin: str, arch: int
) -> None:
    device = Device(reported, 66, *capability)
    found, like = gpu_to_calibrate(device), GPUS[kin]
    assert (found.name, found.cc, found.sms, found.l2_mb) == (reported, arch, 66, 60)
    assert found.teraflops == pytest.approx(like.teraflops * 66 / like.sms)
    assert (found.sm_warps, found.mhz) == (like.sm_warps, like.mhz)
    assert gpu_to_calibrate(Device("NVIDIA H100 PCIe", 66)).name == "h100"


def test_a_device_that_is_too_old_is_refused() -> None:
    with pytest.raises(UsageFault, match=r"Tesla T4 is of sm_75.*sm_80"):
        gpu_to_calibrate(Device("Tesla T4", 40, 7, 5))


def test_a_device_has_the_sizes_it_reports_and_its_share_of_the_peak() -> None:
    whole, part = GPUS["h100"], gpu_of_device(Device("NVIDIA H100 PCIe", 66))
    assert replace(whole, sms=66, l2_mb=60, teraflops=whole.teraflops / 2) == part


def test_calibration_keeps_the_peaks_and_replaces_the_guesses() -> None:
    before = GPUS["h200"]
    after = calibrated(before, teraflops=803.3, gigabytes_per_s=4294.3, launch_us=3.0)
    assert after.dense_share * after.teraflops == pytest.approx(803.3)
    assert after.copy_share * after.gigabytes_per_s == pytest.approx(4294.3)
    assert replace(before, launch_us=3.0) == replace(
        after, dense_share=before.dense_share, copy_share=before.copy_share
    )


@pytest.mark.parametrize("figures", [(0.0, 1.0, 1.0), (1.0, float("nan"), 1.0), (1.0, 1.0, -1.0)])
def test_what_cannot_have_been_measured_is_refused(figures: tuple[float, float, float]) -> None:
    with pytest.raises(UsageFault, match="time a large GEMM"):
        calibrated(GPUS["h100"], *figures)
