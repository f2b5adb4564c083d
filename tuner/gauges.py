"""What a video takes besides time: memory or energy, the third objective of a trade-off curve."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Protocol

import numpy as np
import torch

from ditune.accel.apply import Summary
from ditune.db.curve import Also
from ditune.db.errors import UsageFault
from ditune.db.policy import Policy
from ditune.db.records import Constraint
from ditune.tuner.devices import device_name
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.source import Source

_MILLI = 1e-3


class Gauge(Protocol):
    """Reads what one call of a pipeline takes."""

    def start(self) -> None:
        """Begin a call."""

    def read(self, summary: Summary) -> float:
        """Return what the call took, now that it is over and the device idle.

        Args:
            summary: What the policy did in it.
        """


class Memory:
    """Peak memory in bytes: on CUDA what torch allocated, on a CPU the weights and the caches."""

    def __init__(self, device: torch.device) -> None:
        """Prepare to read a device."""
        self._device = device

    def start(self) -> None:
        """Forget earlier peaks."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self, summary: Summary) -> float:
        """Return the peak since the start."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device))
        return float(summary.peak_weight_bytes + summary.cache_bytes)


class Energy:
    """Energy in joules by the device's own counter, which moves some ten times a second."""

    def __init__(self, device: torch.device) -> None:
        """Find the counter.

        Raises:
            UsageFault: The device has none.
        """
        if device.type != "cuda":
            raise UsageFault(
                f"the energy of a call cannot be measured on {device.type}: it needs an NVIDIA "
                "device with an energy counter; leave --also energy out, or take --also memory"
            )
        import pynvml

        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(device_name(device))
            self._before = self._joules()
        except pynvml.NVMLError as fault:
            raise UsageFault(
                f"the energy of a call cannot be measured here: NVML says {fault}; "
                "leave --also energy out, or take --also memory"
            ) from fault

    def start(self) -> None:
        """Read the counter."""
        self._before = self._joules()

    def read(self, summary: Summary) -> float:
        """Return the difference to the start."""
        return self._joules() - self._before

    def _joules(self) -> float:
        import pynvml

        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) * _MILLI


def gauge_of(also: Also | None, device: torch.device) -> Gauge | None:
    """Return what reads a third objective on a device, None where there is none.

    Raises:
        UsageFault: The device cannot say.
    """
    if also is None:
        return None
    return Memory(device) if also == "memory" else Energy(device)


class GaugedEvaluator(Evaluator):
    """An evaluator that also notes what every tuned video takes."""

    def __init__(
        self, source: Source, constraints: Sequence[Constraint], also: Also | None
    ) -> None:
        """Prepare to measure a source; nothing runs yet.

        Args:
            source: The pipeline and its arguments.
            constraints: What is scored.
            also: What to note; nothing by default.

        Raises:
            UsageFault: The device cannot say.
        """
        super().__init__(source, constraints)
        self._gauge = gauge_of(also, self.device)
        self._taken: list[float] = []

    def tuned(self, policy: Policy, case: Case) -> tuple[np.ndarray, float, Summary]:
        """Return the video under a policy, its latency in milliseconds, and what the policy did."""
        if self._gauge is None:
            return super().tuned(policy, case)
        self._gauge.start()
        found = super().tuned(policy, case)
        self._taken.append(self._gauge.read(found[2]))
        return found

    def drain(self) -> float | None:
        """Return the median over the videos since the last time, None if nothing was noted."""
        taken, self._taken = self._taken, []
        return median(taken) if taken else None
