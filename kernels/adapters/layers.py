"""Find the layers of experts in a model, and put the kernels in their place or take them out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ditune.db.errors import DituneError, UsageFault
from ditune.db.moe import MoeShape, MoeTuning
from ditune.kernels.adapters.hidream import HiDreamExperts
from ditune.kernels.adapters.modules import STATE, Adapter
from ditune.kernels.adapters.nucleus import NucleusExperts
from ditune.kernels.adapters.transformers_experts import TransformersExperts
from ditune.kernels.adapters.trial import difference, probe
from ditune.kernels.dispatch import launch_faults

ADAPTERS: tuple[Adapter, ...] = (TransformersExperts(), HiDreamExperts(), NucleusExperts())


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A layer of experts that the kernels can compute.

    Args:
        name: Of the module in the model, dotted.
        kind: Which adapter knows it.
        shape: What it is tuned as.
        module: The instance.
    """

    name: str
    kind: str
    shape: MoeShape
    module: nn.Module

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.module.parameters()).device


@dataclass(frozen=True)
class RefusedLayer:
    """A layer of experts that stays as it is, and why."""

    name: str
    kind: str
    reason: str


def survey(model: nn.Module) -> list[FoundLayer | RefusedLayer]:
    """Return every layer of experts of a model in the order of its modules; changes nothing."""
    seen: list[FoundLayer | RefusedLayer] = []
    for name, module in model.named_modules():
        for adapter in ADAPTERS:
            if adapter.matches(module):
                seen.append(_seen(name, module, adapter))
    return seen


def find_layers(model: nn.Module) -> list[FoundLayer]:
    """Return the layers of experts of a model that the kernels can compute; changes nothing."""
    return [layer for layer in survey(model) if isinstance(layer, FoundLayer)]


def is_attached(module: nn.Module) -> bool:
    """Whether the kernels stand in a module's place."""
    return STATE in module.__dict__


def attach(layer: FoundLayer, tuning: MoeTuning | None) -> int:
    """Put the kernels in the place of a layer, on this instance only, after a trial.

    Args:
        layer: As `find_layers` found it.
        tuning: Its tiles; None for the defaults.

    Returns:
        Bytes of weights that were laid anew, in place: no more memory than before is kept.

    Raises:
        UsageFault: Weights are not in memory, or the trial failed; the layer is as it was.
    """
    if any(weight.is_meta for weight in layer.module.parameters()):
        raise UsageFault("its weights are not in memory: load the model without offloading first")
    adapter = _adapter(layer.kind)
    relaid = adapter.attach(layer.module, tuning)
    reason = "its trial was interrupted"
    try:
        reason = _trial(adapter, layer)
    finally:
        if reason:
            adapter.detach(layer.module)
    if reason:
        raise UsageFault(reason)
    return relaid


def detach(layer: FoundLayer) -> None:
    """Give a layer back as it was."""
    _adapter(layer.kind).detach(layer.module)


def _trial(adapter: Adapter, layer: FoundLayer) -> str:
    """Say why the kernels may not stand in for an attached layer; empty if they may."""
    device = layer.device
    faults: tuple[type[Exception], ...] = (RuntimeError, DituneError)  # out of memory is among them
    faults += launch_faults()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            own, ours = adapter.outputs(layer.module, probe(layer.shape, device))
            return difference(own, ours, layer.shape)
    except faults as error:
        return f"its trial stopped: {' '.join(str(error).split())}"


def _seen(name: str, module: nn.Module, adapter: Adapter) -> FoundLayer | RefusedLayer:
    try:
        return FoundLayer(name, adapter.kind, adapter.shape(module), module)
    except UsageFault as refusal:
        return RefusedLayer(name, adapter.kind, str(refusal))


def _adapter(kind: str) -> Adapter:
    return next(adapter for adapter in ADAPTERS if adapter.kind == kind)
