"""Put the static-batched kernels in the place of a model's experts, and take them out again.

Tilings change results by rounding alone, so they need no policy and no floors: each layer takes the
tuning that is stored for its shape on this hardware, or the defaults, after a trial of its own.
"""

from __future__ import annotations

import functools
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import nn

from ditune.accel import fingerprint
from ditune.accel.internals import moved_by
from ditune.accel.lookup import database_file
from ditune.db.errors import DituneError, UsageFault
from ditune.db.moe import MoeShape, MoeTuning
from ditune.db.readonly import find_tunings
from ditune.db.records import Hardware
from ditune.db.tunings import TunedLayer, newest
from ditune.kernels.adapters import layers
from ditune.kernels.adapters.layers import FoundLayer, RefusedLayer
from ditune.kernels.digest import kernels_digest
from ditune.kernels.hardware import DeviceProperties, any_device, gpu_of_device


@dataclass(frozen=True)
class ExpertLayer:
    """What became of one layer of experts.

    Args:
        name: Of the module in the model.
        kind: Which adapter knows it.
        shape: None where the layer is one that the kernels do not compute.
        attached: Whether the kernels run in its place.
        tuned: Whether they have tiles that were found for it; else the defaults.
        reason: Why it is not tuned or not attached; empty where it is both.
        packed_bytes: Weights that were laid anew, in place: no more memory than before is kept,
            and one layer's more was needed while it was done.
    """

    name: str
    kind: str
    shape: MoeShape | None
    attached: bool
    tuned: bool
    reason: str
    packed_bytes: int

    @property
    def words(self) -> str:
        """Everything but the name, as words."""
        what = self.kind if self.shape is None else f"{self.kind}, {self.shape.words}"
        if not self.attached:
            return f"{what}: left as it is: {self.reason}"
        how = "tuned tiles" if self.tuned else f"default tiles: {self.reason}"
        laid = f"; {self.packed_bytes / 2**20:.1f} MiB laid anew in place" * bool(self.packed_bytes)
        return f"{what}: {how}{laid}"


@dataclass(frozen=True)
class ExpertsSummary:
    """What became of all layers of experts of a model."""

    layers: tuple[ExpertLayer, ...]

    @property
    def packed_bytes(self) -> int:
        """Weights that were laid anew, of all layers."""
        return sum(layer.packed_bytes for layer in self.layers)

    def __str__(self) -> str:
        """Say it in one line, and one more for each kind of outcome."""
        attached = sum(layer.attached for layer in self.layers)
        tuned = sum(layer.tuned for layer in self.layers)
        counts = Counter(layer.words for layer in self.layers)
        lines = [
            f"ditune: {attached} of {len(self.layers)} layers of experts run on its kernels, "
            f"{tuned} with tuned tiles; {self.packed_bytes / 2**20:.1f} MiB of weights laid anew"
        ]
        return "\n".join(lines + [f"  {count} x {words}" for words, count in counts.items()])


class AppliedExperts:
    """A model whose experts run on the kernels; a context manager that takes them out again."""

    def __init__(self, model: nn.Module, *, db: str | Path | None = None) -> None:
        """Attach to every layer of a model; see `accelerate_experts`."""
        found = layers.survey(model)
        _require_attachable(model, found)
        self._attached: list[FoundLayer] = []
        tunings = _Tunings(db)
        with ExitStack() as undone:  # if it is interrupted, by Ctrl-C for one
            undone.callback(self.remove)
            self._layers = tuple(self._take(layer, tunings) for layer in found)
            undone.pop_all()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the kernels out."""
        self.remove()

    def remove(self) -> None:
        """Give every layer back; the model is bit for bit what it was."""
        while self._attached:
            layers.detach(self._attached.pop())

    def summary(self) -> ExpertsSummary:
        """Return what became of each layer when the kernels were attached."""
        return ExpertsSummary(self._layers)

    def _take(self, layer: FoundLayer | RefusedLayer, tunings: _Tunings) -> ExpertLayer:
        """Attach to one layer if that can be done, and say what was done."""
        if isinstance(layer, RefusedLayer):
            return ExpertLayer(layer.name, layer.kind, None, False, False, layer.reason, 0)
        tuning, reason = tunings.of(layer)
        try:
            packed = layers.attach(layer, tuning)
        except UsageFault as fault:
            return ExpertLayer(layer.name, layer.kind, layer.shape, False, False, str(fault), 0)
        self._attached.append(layer)
        tuned = tuning is not None
        return ExpertLayer(layer.name, layer.kind, layer.shape, True, tuned, reason, packed)


class _Tunings:
    """What is stored for layers, read once for each device."""

    def __init__(self, db: str | Path | None) -> None:
        self._db = db
        self._stored: dict[torch.device, list[list[TunedLayer]] | str] = {}

    def of(self, layer: FoundLayer) -> tuple[MoeTuning | None, str]:
        """Return a layer's tuning, or None and why there is none."""
        device = layer.device
        if device not in self._stored:
            self._stored[device] = self._read(device)
        stored = self._stored[device]
        if isinstance(stored, str):
            return None, stored
        versions, kernels = fingerprint.software(), kernels_digest()
        found = [newest(layers, layer.shape, versions, kernels) for layers in stored]
        known = [tuning for tuning, _ in found if tuning is not None]
        if not known:
            return None, found[0][1]
        return functools.reduce(MoeTuning.and_of, known), ""

    def _read(self, device: torch.device) -> list[list[TunedLayer]] | str:
        """Return the tunings for a device, then those for any of its model, or why there are none.

        What was timed on the device itself goes before what was predicted for its model.
        """
        try:
            path = database_file(self._db)
            if not path.exists():
                return f"nothing was tuned yet: {path} does not exist"
            return [find_tunings(path, hardware) for hardware in _hardware(device)]
        except DituneError as fault:  # a damaged store must not stop a generation
            return str(fault)


def _hardware(device: torch.device) -> list[Hardware]:
    """Return under what tunings for a device may be stored."""
    found = [fingerprint.hardware(device)]
    if device.type == "cuda":
        properties = cast(DeviceProperties, torch.cuda.get_device_properties(device))
        with suppress(UsageFault):  # the table does not have every GPU
            found.append(any_device(gpu_of_device(properties)))
    return found


def accelerate_experts(model: nn.Module, *, db: str | Path | None = None) -> AppliedExperts:
    """Compute the experts of a model with static-batched kernels, in its tuned tiles if there are.

    Layers are taken over one by one, each after a trial on a small random input; one whose output
    would differ by more than rounding stays as it is, and the summary says why. Routing stays the
    model's. Calls that need gradients, run under autocast, or find `DITUNE_DISABLE=1` in the
    environment take the model's own code.

    Args:
        model: A transformer of transformers, or HiDream's or NucleusMoE's of diffusers, where it
            will run: on its device and in its dtype.
        db: The database; `$DITUNE_DB` or the user's data folder by default. Without one, or
            without a tuning for a shape, the default tiles run.

    Returns:
        A handle: use it in `with`, or call `remove()`; `summary()` tells what became of each layer.

    Raises:
        UsageFault: The model has no layers of experts, already carries the kernels, or moves its
            weights in groups.
    """
    return AppliedExperts(model, db=db)


def _require_attachable(model: nn.Module, found: list[FoundLayer | RefusedLayer]) -> None:
    """Refuse models in which there is nothing to do, or no safe way to do it."""
    if not found:
        raise UsageFault(
            f"{type(model).__name__} has no layers of experts that ditune knows: give it a "
            "transformers model with experts, or the transformer of HiDream-I1 or NucleusMoE-Image"
        )
    if any(layers.is_attached(module) for module in model.modules()):
        raise UsageFault(
            f"the experts of this {type(model).__name__} already run on ditune's kernels: call "
            ".remove() on the earlier result of accelerate_experts() first"
        )
    if moved_by(model) == "enable_group_offload":
        raise UsageFault(
            "this model's weights are moved in groups while it runs, and the kernels read them all "
            "at once: attach without enable_group_offload()"
        )
