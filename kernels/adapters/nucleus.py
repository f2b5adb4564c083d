"""The experts of NucleusMoE-Image in diffusers: packed, stored transposed, equal counts.

Experts choose their tokens, so rows arrive sorted by expert and leave in the same order: each row
is one token with one slot. The weights are laid anew in place, so that their transposes, which the
kernels read, are contiguous; shapes and values, as the model's own code sees them, stay.

Source: diffusers 0.42.1, `SwiGLUExperts` in transformer_nucleusmoe_image.py.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

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

_SOURCE = "diffusers.models.transformers.transformer_nucleusmoe_image"
_NAMES = ("gate_up_proj", "down_proj")


class NucleusExperts:
    """Adapter of `SwiGLUExperts`: its forward is replaced on single instances."""

    kind = "NucleusMoE experts"

    def matches(self, module: Any) -> bool:
        """Whether it is that class."""
        return is_a(module, _SOURCE, "SwiGLUExperts")

    def shape(self, module: Any) -> MoeShape:
        """Return the layer's shape; a row has one expert, because experts choose tokens."""
        require_own(module, "forward")
        gate_up, down = (plain_weight(module, name) for name in _NAMES)
        if gate_up.dtype != down.dtype or gate_up.device != down.device:
            raise UsageFault("its two weights are of different dtypes or on different devices")
        return shape_of(gate_up.mT.shape, 1, gate_up.dtype)

    def attach(self, module: Any, tuning: MoeTuning | None) -> int:
        """Lay the weights anew and put our function in place of the module's."""
        experts = _read(module)
        setattr(module, STATE, State(tuning))
        module.forward = types.MethodType(_forward, module)
        return experts.gate_up.nbytes + experts.down.nbytes

    def detach(self, module: Any) -> None:
        """Lay the weights as they were and give the module its function."""
        module.__dict__.pop(STATE)
        del module.__dict__["forward"]
        for name in _NAMES:
            weight = getattr(module, name)
            weight.data = relaid(weight, Tensor.contiguous)

    def outputs(self, module: Any, probe: Probe) -> tuple[Tensor, Tensor]:
        """Return both outputs for the rows of the probe, sorted by expert."""
        experts, rows = probe.indices.flatten().sort()
        counts = torch.bincount(experts, minlength=module.num_experts)
        given = probe.hidden[rows // probe.indices.shape[1]], counts
        return type(module).forward(module, *given), _forward(module, *given)


def _forward(module: Any, x: Tensor, num_tokens_per_expert: Tensor) -> Tensor:
    """What NucleusMoE's layer calls in place of its experts' forward."""
    own = module.gate_up_proj, module.down_proj
    if not takes(x, Experts(*own)):
        output: Tensor = type(module).forward(module, x, num_tokens_per_expert)
        return output
    # rows of padding lie behind all counts: they get an id that is not here, and zeros
    ends = num_tokens_per_expert.cumsum(0)
    rows = torch.arange(x.shape[0], device=x.device)
    indices = torch.searchsorted(ends, rows, right=True).unsqueeze(1)
    weights = torch.ones_like(indices, dtype=x.dtype)
    state: State = getattr(module, STATE)
    experts = state.experts(own, lambda: _read(module))
    return state.run(x, experts, indices, weights)


def _read(module: Any) -> Experts:
    """Return the weights as the kernels read them, laid anew where they are not yet.

    A graph that is being compiled cannot lay them anew: there it is a copy at each call.
    """
    for name in _NAMES:
        weight = getattr(module, name)
        if not weight.mT.is_contiguous() and not torch.compiler.is_compiling():
            weight.data = relaid(weight, lambda w: w.mT.contiguous().transpose(1, 2))
    return Experts(module.gate_up_proj.mT.contiguous(), module.down_proj.mT.contiguous())
