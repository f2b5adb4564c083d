"""The whole MoE layer in plain torch: what every faster implementation is compared with.

It loops over experts and gathers their rows, in float32, and does nothing clever. Routing is given:
the router is a part of the model, and which experts it picks is not ours to change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ditune.db.errors import UsageFault

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Experts:
    """The weights of all experts, packed; the layout is that of transformers' `Experts` modules.

    Args:
        gate_up: Gate rows above up rows, [experts, 2 * inner, hidden], float.
        down: Second projection, [experts, hidden, inner], same dtype and device.
    """

    gate_up: Tensor
    down: Tensor

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.gate_up.shape[0]


def moe_reference(hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the output of a mixture-of-experts layer, expert by expert.

    Each token's output is the sum over its slots of weight * down(silu(gate(x)) * up(x)). GEMMs and
    the sum run in float32 (in float64 for float64 input), whatever the input dtype is; the result
    is rounded once, at the end.

    Args:
        hidden: Tokens, [tokens, hidden], float; tokens may be 0.
        experts: Packed weights, same dtype and device as `hidden`.
        indices: Expert of each slot of each token, [tokens, top_k], any integer dtype, top_k >= 1.
            An index below 0 or beyond the last expert is an expert that another device holds, as
            in expert parallelism; its slot adds nothing. One expert may stand in two slots.
        weights: Routing weight of each slot, [tokens, top_k], float, taken as it is.

    Returns:
        [tokens, hidden], dtype of `hidden`.

    Raises:
        UsageFault: Shapes, dtypes or devices do not fit together; the message names which.
    """
    check_layer(hidden, experts, indices, weights)
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    output = torch.zeros(hidden.shape, dtype=accumulate, device=hidden.device)
    for expert in range(experts.count):
        token, slot = torch.nonzero(indices == expert, as_tuple=True)
        if token.numel() == 0:
            continue
        rows = _expert(hidden[token], experts.gate_up[expert], experts.down[expert], accumulate)
        # index_add_, not assignment: a token may have one expert in two slots
        output.index_add_(0, token, rows * weights[token, slot, None].to(accumulate))
    return output.to(hidden.dtype)


def _expert(rows: Tensor, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one expert's output for its rows, [rows, hidden] in `dtype`."""
    gate, up = (rows.to(dtype) @ gate_up.to(dtype).T).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ down.to(dtype).T


def check_layer(hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> None:
    """Refuse a layer whose parts do not fit together, without a look at their values.

    Raises:
        UsageFault: Shapes, dtypes or devices do not fit together; the message names which.
    """
    _check_experts(hidden, experts)
    _check_routing(hidden, indices, weights)


def _check_experts(hidden: Tensor, experts: Experts) -> None:
    """Refuse tokens and weights that do not fit together."""
    gate_up, down = experts.gate_up, experts.down
    if hidden.ndim != 2 or hidden.dtype not in FLOATS:
        raise UsageFault(
            f"hidden must be [tokens, hidden] in a float dtype, but is {_describe(hidden)}; "
            "flatten batch and sequence first"
        )
    width = hidden.shape[1]
    packed = gate_up.ndim == 3 and gate_up.shape[0] >= 1 and gate_up.shape[1] % 2 == 0
    if not packed or gate_up.shape[2] != width:
        raise UsageFault(
            f"gate_up must be [experts, 2 * inner, {width}] with at least one expert, but is "
            f"{_describe(gate_up)}; gate rows stand above up rows, and both end in the hidden size"
        )
    wanted = (gate_up.shape[0], width, gate_up.shape[1] // 2)
    if tuple(down.shape) != wanted:
        raise UsageFault(
            f"down must be [experts, hidden, inner] = {wanted} to follow gate_up, but is "
            f"{_describe(down)}"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.dtype != hidden.dtype or weight.device != hidden.device:
            raise UsageFault(
                f"{name} is {_describe(weight)} and hidden is {_describe(hidden)}; bring both to "
                "one dtype and device"
            )


def _check_routing(hidden: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Refuse routing that does not fit the tokens."""
    whole = indices.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    slots = indices.ndim == 2 and indices.shape[1] >= 1 and indices.shape[0] == hidden.shape[0]
    if not (whole and slots):
        raise UsageFault(
            f"indices must be [{hidden.shape[0]}, top_k] whole numbers, one row per token, but is "
            f"{_describe(indices)}"
        )
    if weights.shape != indices.shape or weights.dtype not in FLOATS:
        raise UsageFault(
            f"weights must be float and shaped like indices, {tuple(indices.shape)}, but is "
            f"{_describe(weights)}"
        )
    if not indices.device == weights.device == hidden.device:
        raise UsageFault(
            f"hidden is on {hidden.device}, indices on {indices.device}, weights on "
            f"{weights.device}; bring all to one device"
        )


def _describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of a tensor for a message."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
