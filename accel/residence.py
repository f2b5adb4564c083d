"""Where the weights of two models are while one takes over from the other.

Weights are copied to the host once. From then on a model leaves the device by letting go of its
copy there, without a transfer, and comes back with one: what changes them (`fuse_lora`) has to come
before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ditune.accel.internals import moved_by
from ditune.accel.payload import byte_count
from ditune.db.errors import UsageFault

Offload = Literal["none", "lazy", "swap"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)


def weight_bytes(model: nn.Module) -> int:
    """Return the size of all parameters and buffers."""
    return sum(byte_count(tensor) for tensor in _tensors(model))


def peak_weight_bytes(large_bytes: int, small_bytes: int, offload: Offload) -> tuple[int, int]:
    """Return the bytes of weights on the device before and after the first switch.

    Args:
        large_bytes: Of the large model.
        small_bytes: Of the small one.
        offload: "none": both are always there. "lazy": the small one comes at the switch. "swap":
            it comes as the large one goes.
    """
    before = large_bytes + (small_bytes if offload == "none" else 0)
    after = small_bytes + (large_bytes if offload != "swap" else 0)
    return before, after


class Weights:
    """The weights of a model, on the host and now and then on a device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Copy what is on the device to the host; what is there already is used as it is."""
        self._device = device
        self._there = next(_tensors(model)).device == device
        self._tensors = list(_tensors(model))
        self._host = [_hosted(tensor) if self._there else tensor.data for tensor in self._tensors]

    @property
    def device_bytes(self) -> int:
        """What of it is on the device."""
        return sum(map(byte_count, self._tensors)) if self._there else 0

    def bring(self) -> None:
        """Put a copy on the device."""
        if not self._there:
            self._there = True
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = torch.empty_like(host, device=self._device).copy_(host, True)

    def release(self) -> None:
        """Let go of the copy on the device."""
        if self._there:
            self._there = False
            for tensor, host in zip(self._tensors, self._host, strict=True):
                tensor.data = host


class Residence:
    """Moves the weights of a large and a small model as the hand-off needs them."""

    def __init__(
        self,
        large: Sequence[nn.Module],
        small: nn.Module,
        offload: Offload,
        device: torch.device,
    ) -> None:
        """Make the small model leave the device until it is needed.

        Args:
            large: The pipeline's own, on the device; of two experts, none ever leaves.
            small: There or on the host.
            offload: "lazy" or "swap"; see `peak_weight_bytes`.
            device: Where calls run.
        """
        self._swaps = offload == "swap"
        self._small = Weights(small, device)
        self._large = Weights(large[0], device) if self._swaps else None
        self._large_bytes = sum(map(weight_bytes, large))
        self.peak_bytes = 0  # of the call that runs, or of the last one
        self.leave()

    def require(self, *, small: bool) -> None:
        """See to it that one of the two is there, before it runs; the one that goes goes first."""
        if self._large is not None:
            (self._large if small else self._small).release()
            (self._small if small else self._large).bring()
        elif small:
            self._small.bring()
        self._count()

    def begin(self) -> None:
        """Count anew, for a call that begins."""
        self.peak_bytes = 0
        self._count()

    def leave(self) -> None:
        """End a call: the large model is there, as the pipeline expects; the small one is not."""
        self._small.release()
        if self._large is not None:
            self._large.bring()

    def _count(self) -> None:
        large = self._large_bytes if self._large is None else self._large.device_bytes
        self.peak_bytes = max(self.peak_bytes, large + self._small.device_bytes)


def require_movable(models: Sequence[nn.Module], small: nn.Module | None, offload: Offload) -> None:
    """Refuse to move the weights of a pipeline's denoisers where that cannot go well.

    Raises:
        UsageFault: The mode is unknown, something else moves the weights, or there are two experts.
    """
    if offload not in OFFLOADS:
        raise UsageFault(f"offload is one of {', '.join(OFFLOADS)}, not {offload!r}")
    if offload == "swap" and len(models) > 1:
        raise UsageFault(
            f'offload="swap" moves one large model and this pipeline has {len(models)}: '
            'use offload="lazy"'
        )
    moved = next(filter(None, map(moved_by, models)), None)
    if offload == "swap" and moved is not None:
        raise UsageFault(f'the pipeline moves its models by itself ({moved}): use offload="lazy"')
    moved = None if small is None else moved_by(small)
    if offload != "none" and moved is not None:
        raise UsageFault(
            f'the small model\'s weights move by themselves ({moved}): leave offload at "none"'
        )


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _hosted(tensor: Tensor) -> Tensor:
    """Return a copy on the host, in pinned memory where a GPU will fetch it."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor.data)
