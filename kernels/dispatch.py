"""One call for the experts of a layer, whatever they run on.

CPU tensors go to the pool of threads, CUDA devices from sm_80 on to the Triton kernels, everything
else to the reference, which is right and slow.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from ditune.db.kill_switch import disabled
from ditune.db.moe import CpuTiles, Dtype, MoeShape, MoeTuning, Tiles, default_tiles
from ditune.kernels.reference import Experts, moe_reference

Kind = Literal["cpu", "gpu"]
OLDEST_CAPABILITY = (8, 0)


def moe(
    hidden: Tensor,
    experts: Experts,
    indices: Tensor,
    weights: Tensor,
    tuning: MoeTuning | None = None,
) -> Tensor:
    """Return the output of a mixture-of-experts layer; see `moe_reference` for what it computes.

    Args:
        hidden: Tokens, [tokens, hidden].
        experts: Packed weights, same dtype and device.
        indices: Expert of each slot, [tokens, top_k]; ids that are not here add nothing.
        weights: Routing weight of each slot, [tokens, top_k], any float dtype.
        tuning: What was found for layers of this shape. One of another shape or for another kind of
            device, as after a move of the model, counts as none: the defaults run.

    Returns:
        [tokens, hidden], dtype of `hidden`.

    Raises:
        UsageFault: Shapes, dtypes or devices do not fit together.
    """
    kind, dtype = device_kind(hidden.device), dtype_name(hidden.dtype)
    if kind is None or dtype is None or indices.ndim != 2 or experts.gate_up.ndim != 3:
        return moe_reference(hidden, experts, indices, weights)
    shape = _shape(experts.gate_up.shape, indices.shape[1], dtype)
    if tuning is None or tuning.shape != shape or tuning.default.kind != kind:
        tuning = _default(shape, kind)
    hidden = hidden.contiguous()
    if kind == "cpu":
        from ditune.kernels.cpu_tiles import moe_cpu

        return moe_cpu(hidden, experts, indices, weights, tuning)
    from ditune.kernels.triton_moe import moe_triton

    return moe_triton(hidden, experts, indices, weights, tuning)


@torch.library.custom_op("ditune::moe", mutates_args=())
def moe_in_graph(
    hidden: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, tuning: str
) -> Tensor:
    """Do what `moe` does as one node of a compiled graph, which holds no records.

    Args:
        hidden: As for `moe`, like all that follow.
        gate_up: First weights.
        down: Second weights.
        indices: Expert of each slot.
        weights: Routing weight of each slot.
        tuning: The JSON of the tuning, empty for none.
    """
    return moe(hidden, Experts(gate_up, down), indices, weights, _parsed(tuning))


@moe_in_graph.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _parsed(tuning: str) -> MoeTuning | None:
    """Return the tuning of a graph's node, which gets its weights as new tensors at each call.

    So packed copies of them would be made at each call: they are left out.
    """
    if not tuning:
        return None
    found = MoeTuning.model_validate_json(tuning)
    choices = tuple(c.model_copy(update={"tiles": _unpacked(c.tiles)}) for c in found.choices)
    return found.model_copy(update={"default": _unpacked(found.default), "choices": choices})


def _unpacked(tiles: Tiles) -> Tiles:
    return tiles.model_copy(update={"prepacked": False}) if tiles.kind == "cpu" else tiles


def default_tuning(shape: MoeShape, device: torch.device) -> MoeTuning:
    """Return the tuning of a shape that nobody tuned: the default tiles for every routing.

    Args:
        shape: Of the layer.
        device: What it runs on; other than a CUDA device counts as a CPU.
    """
    return _default(shape, device_kind(device) or "cpu")


def takes(hidden: Tensor, experts: Experts) -> bool:
    """Whether a call of a model's layer may go to the kernels; else the model's own code runs.

    The kernels have no backward, know nothing of autocast, and do not mix dtypes. A compiled graph
    keeps what it was compiled with, whatever the switch says later.
    """
    if not torch.compiler.is_compiling() and disabled():
        return False
    same = hidden.dtype == experts.gate_up.dtype and hidden.device == experts.gate_up.device
    wanted = torch.is_grad_enabled() and (
        hidden.requires_grad or experts.gate_up.requires_grad or experts.down.requires_grad
    )
    return same and not wanted and not torch.is_autocast_enabled(hidden.device.type)


def dtype_name(dtype: torch.dtype) -> Dtype | None:
    """Return the name of a dtype that layers are tuned in, None for another."""
    name = str(dtype).removeprefix("torch.")
    return cast(Dtype, name) if name in get_args(Dtype) else None


@functools.cache
def device_kind(device: torch.device) -> Kind | None:
    """Return which kind of tiles a device has, None if only the reference runs there."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return "gpu" if torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY else None


@functools.cache
def launch_faults() -> tuple[type[Exception], ...]:
    """Return what a kernel's compilation or launch raises beside torch's own errors."""
    if importlib.util.find_spec("triton") is None:
        return ()
    from triton.errors import TritonError

    return (TritonError,)


@functools.lru_cache(maxsize=1024)  # one per layer shape: building a record costs microseconds
def _shape(gate_up: torch.Size, top_k: int, dtype: Dtype) -> MoeShape:
    experts, both, hidden = gate_up
    return MoeShape(experts=experts, hidden=hidden, inner=both // 2, top_k=top_k, dtype=dtype)


@functools.lru_cache(maxsize=1024)
def _default(shape: MoeShape, kind: Kind) -> MoeTuning:
    tiles = CpuTiles() if kind == "cpu" else default_tiles(shape.dtype)
    return MoeTuning(shape=shape, default=tiles)
