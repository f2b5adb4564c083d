"""Experts of transformers' models, which run what is registered under a name in their config.

The name is set on the layer's own copy of the config: layers that stay as they are never pass
through here, and the config of the model, which is saved and fingerprinted, says what it said.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, MoeTuning
from ditune.kernels.adapters.modules import STATE, State, plain_weight, shape_of
from ditune.kernels.adapters.trial import Probe
from ditune.kernels.dispatch import takes
from ditune.kernels.reference import Experts

NAME = "ditune"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")  # set by the interface
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")  # names in configs


@dataclass
class _State(State):
    """What an attached module carries: the config it had, too."""

    config: Any


class TransformersExperts:
    """Adapter of every `*Experts` module behind transformers' interface."""

    kind = "transformers experts"

    def matches(self, module: Any) -> bool:
        """Whether the module's forward goes through the interface."""
        return all(hasattr(module, flag) for flag in _FLAGS) and hasattr(
            type(module).forward, "__wrapped__"
        )

    def shape(self, module: Any) -> MoeShape:
        """Return the layer's shape, or refuse what is not silu(gate) * up without biases."""
        reason = _obstacle(module)
        if reason:
            raise UsageFault(reason)
        gate_up, down = plain_weight(module, "gate_up_proj"), plain_weight(module, "down_proj")
        if gate_up.dtype != down.dtype or gate_up.device != down.device:
            raise UsageFault("its two weights are of different dtypes or on different devices")
        return shape_of(gate_up.shape, _top_k(module), gate_up.dtype)

    def attach(self, module: Any, tuning: MoeTuning | None) -> int:
        """Let the module's config name our function; the weights stay where they are."""
        from transformers.integrations.moe import ExpertsInterface

        ExpertsInterface.register(NAME, _forward)
        setattr(module, STATE, _State(tuning, module.config))
        named = copy.copy(module.config)
        named._experts_implementation_internal = NAME  # the public name would reach sub-configs
        module.config = named
        return 0

    def detach(self, module: Any) -> None:
        """Give the module its config back."""
        module.config = module.__dict__.pop(STATE).config

    def outputs(self, module: Any, probe: Probe) -> tuple[Tensor, Tensor]:
        """Return both outputs, with slots of other devices where experts are spread over them."""
        indices, weights = probe.indices, probe.weights
        if module._is_expert_parallel:
            indices, weights = indices.clone(), weights.clone()
            indices[::3, 0], weights[::3, 0] = module.num_experts, 0.0
        given = probe.hidden, indices, weights
        return _own(module)(module, *given), _forward(module, *given)


def _forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in place of its own functions."""
    experts = Experts(module.gate_up_proj, module.down_proj)
    if not takes(hidden_states, experts) or top_k_weights.requires_grad:
        output: Tensor = _own(module)(module, hidden_states, top_k_index, top_k_weights)
        return output
    state: _State = getattr(module, STATE)
    experts = state.experts((experts.gate_up, experts.down), lambda: experts)
    return state.run(hidden_states, experts, top_k_index, top_k_weights)


def _own(module: Any) -> Any:
    """Return the function that ran before the module was attached."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    chosen = getattr(module, STATE).config._experts_implementation
    return ALL_EXPERTS_FUNCTIONS.get_interface(chosen, type(module).forward.__wrapped__)


def _obstacle(module: Any) -> str:
    """Say why the kernels do not compute what the module does; empty if they do."""
    from transformers.integrations.moe import _default_apply_gate

    activation = getattr(module, "act_fn", None)
    checks = {
        "its experts have no gate, and the kernels compute silu(gate) * up": not module.has_gate,
        "its experts have biases, which the kernels do not add": module.has_bias,
        "its weights are stored transposed, and the kernels read [experts, out, in]": (
            module.is_transposed
        ),
        "its gate and up rows are interleaved, and the kernels read gate above up": (
            not module.is_concatenated
        ),
        "its experts end in a norm, which the kernels leave out": (
            getattr(module, "has_post_expert_norm", False)
        ),
        "its gate is not the plain act(gate) * up": (
            type(module)._apply_gate is not _default_apply_gate
        ),
        f"its activation is {type(activation).__name__}, and the kernels compute SiLU": (
            type(activation).__name__ not in ("SiLU", "SiLUActivation")
        ),
    }
    return next((reason for reason, met in checks.items() if met), "")


def _top_k(module: Any) -> int:
    """Return how many experts a token has, by the module's config."""
    for name in _TOP_K:
        found = getattr(module.config, name, None)
        if isinstance(found, int):
            return found
    raise UsageFault(
        f"its config does not say how many experts a token has: none of {', '.join(_TOP_K)} is a "
        "number there"
    )
