"""The experts of HiDream-I1 in diffusers: one module per expert, packed in place.

The three weights of each expert become views of two packed tensors, so packing costs no memory that
stays, and the model's own code reads the same values as before.

Source: diffusers 0.42.1, `MOEFeedForwardSwiGLU` in transformer_hidream_image.py.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, MoeTuning
from ditune.kernels.adapters.modules import (
    STATE,
    State,
    is_a,
    plain_weight,
    relaid,
    require_own,
    shape_of,
)
from ditune.kernels.adapters.trial import Probe
from ditune.kernels.dispatch import takes
from ditune.kernels.reference import Experts

_SOURCE = "diffusers.models.transformers.transformer_hidream_image"
_NAMES = ("w1", "w2", "w3")  # gate, down, up


class HiDreamExperts:
    """Adapter of `MOEFeedForwardSwiGLU`: its `moe_infer` is replaced on single instances."""

    kind = "HiDream experts"

    def matches(self, module: Any) -> bool:
        """Whether it is that class."""
        return is_a(module, _SOURCE, "MOEFeedForwardSwiGLU")

    def shape(self, module: Any) -> MoeShape:
        """Return the layer's shape, or refuse experts that are not three plain linear layers."""
        require_own(module, "moe_infer")
        experts = module.experts
        if not all(_plain(expert) for expert in experts):
            raise UsageFault(
                "its experts are no longer three linear layers without biases: attach before the "
                "model is quantised or given adapters, or leave this layer as it is"
            )
        weights = [plain_weight(getattr(e, name), "weight") for e in experts for name in _NAMES]
        if len({(w.dtype, w.device) for w in weights}) > 1:
            raise UsageFault("its experts are of several dtypes or on several devices")
        inner, hidden = weights[0].shape
        packed = torch.Size((len(experts), 2 * inner, hidden))
        return shape_of(packed, module.num_activated_experts, weights[0].dtype)

    def attach(self, module: Any, tuning: MoeTuning | None) -> int:
        """Pack the weights and put our function in place of the module's."""
        packed = _pack(module)
        setattr(module, STATE, State(tuning))
        module.moe_infer = types.MethodType(_infer, module)
        return packed.gate_up.nbytes + packed.down.nbytes

    def detach(self, module: Any) -> None:
        """Give each expert memory of its own again, and the module its function."""
        module.__dict__.pop(STATE)
        del module.__dict__["moe_infer"]
        if all(_plain(expert) for expert in module.experts) and _packed(module) is not None:
            for weight in _weights(module):
                weight.data = relaid(weight, torch.clone)

    def outputs(self, module: Any, probe: Probe) -> tuple[Tensor, Tensor]:
        """Return both outputs of `moe_infer`, without the shared expert."""
        given = probe.hidden, probe.indices.flatten(), probe.weights.view(-1, 1)
        return type(module).moe_infer(module, *given), _infer(module, *given)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # memory addresses have no graph
@torch.no_grad()  # as the original
def _infer(
    module: Any, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor
) -> Tensor:
    """What HiDream's layer calls in place of its `moe_infer`."""
    state: State = getattr(module, STATE)
    experts = None
    if all(_plain(expert) for expert in module.experts):  # else a LoRA came, say
        experts = state.experts(_weights(module), lambda: _packed(module) or _pack(module))
    if experts is None or not takes(x, experts):
        output: Tensor = type(module).moe_infer(module, x, flat_expert_indices, flat_expert_weights)
        return output
    slots = x.shape[0], module.num_activated_experts
    indices, weights = flat_expert_indices.view(slots), flat_expert_weights.view(slots)
    return state.run(x, experts, indices, weights)


def _packed(module: Any) -> Experts | None:
    """Return the packed weights that the experts' own are views of, None if they are not."""
    weights = _weights(module)
    first, down = weights[0], weights[1]
    count, (inner, hidden) = len(module.experts), first.shape
    sizes = [w.untyped_storage().nbytes() // w.itemsize for w in (first, down)]
    if sizes != [count * 2 * inner * hidden, count * hidden * inner]:
        return None
    block = inner * hidden
    packed = Experts(
        first.detach().as_strided((count, 2 * inner, hidden), (2 * block, hidden, 1), 0),
        down.detach().as_strided((count, hidden, inner), (block, inner, 1), 0),
    )
    same = all(
        weight.data_ptr() == view.data_ptr() and weight.stride() == view.stride()
        for weight, view in zip(weights, _views(packed), strict=True)
    )
    return packed if same else None


def _pack(module: Any) -> Experts:
    """Lay the weights of all experts into two tensors, and let the experts read them there."""
    weights = _weights(module)
    count, (inner, hidden) = len(module.experts), weights[0].shape
    with torch.inference_mode(False), torch.no_grad():
        packed = Experts(
            weights[0].new_empty(count, 2 * inner, hidden),
            weights[0].new_empty(count, hidden, inner),
        )
        for weight, view in zip(weights, _views(packed), strict=True):
            weight.data = view.copy_(weight)  # what it had is freed before the next one is copied
    return packed


def _weights(module: Any) -> list[Tensor]:
    """Return gate, down and up of each expert in turn."""
    return [getattr(expert, name).weight for expert in module.experts for name in _NAMES]


def _views(packed: Experts) -> Iterator[Tensor]:
    """Yield the same parts of the packed weights in the same order."""
    inner = packed.down.shape[2]
    for gate_up, down in zip(packed.gate_up, packed.down, strict=True):
        yield from (gate_up[:inner], down, gate_up[inner:])


def _plain(expert: nn.Module) -> bool:
    """Whether an expert is three linear layers without biases, and nothing around them."""
    layers = [getattr(expert, name, None) for name in _NAMES]
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
