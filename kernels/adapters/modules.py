"""What all adapters ask of a model's modules: is it one of these, are its weights plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from ditune.db.errors import UsageFault
from ditune.db.moe import MoeShape, MoeTuning
from ditune.kernels import dispatch
from ditune.kernels.adapters.trial import Probe
from ditune.kernels.reference import Experts

STATE = "_ditune_experts"  # where a module carries what its adapter put there


@dataclass
class State:
    """What every attached module carries: its tuning, for graphs as text too.

    On a CPU the weights are handed over as the same tensors at each call, because the kernels may
    keep packed copies for as long as a tensor lives; they are new ones once a weight has changed.
    Elsewhere nothing is kept: a model that is moved away has to free its memory.
    """

    tuning: MoeTuning | None
    text: str = field(init=False)
    _kept: Experts | None = field(init=False, default=None)
    _seen: tuple[object, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        """Write the text once, not at each call."""
        self.text = "" if self.tuning is None else self.tuning.model_dump_json()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the state of a copied module, which has weights of its own."""
        other = copy.copy(self)
        other._kept = None
        return other

    def experts(self, weights: Sequence[Tensor], read: Callable[[], Experts]) -> Experts:
        """Return the weights as the kernels take them.

        Args:
            weights: The module's own.
            read: Makes views of them, and may lay them anew before.
        """
        if torch.compiler.is_compiling() or weights[0].device.type != "cpu":
            return read()
        if self._kept is None or self._seen != _marks(weights):
            found = read()
            self._kept = Experts(found.gate_up.detach(), found.down.detach())
            self._seen = _marks(weights)
        return self._kept

    def run(self, hidden: Tensor, experts: Experts, indices: Tensor, weights: Tensor) -> Tensor:
        """Compute a layer, or write its node into the graph that is being compiled."""
        if torch.compiler.is_compiling():
            output: Tensor = dispatch.moe_in_graph(
                hidden, experts.gate_up, experts.down, indices, weights, self.text
            )
            return output
        return dispatch.moe(hidden, experts, indices, weights, self.tuning)


def _marks(weights: Sequence[Tensor]) -> tuple[object, ...]:
    """Return what changes when a weight is moved, replaced or written to."""
    return tuple((w.data_ptr(), w.dtype, None if w.is_inference() else w._version) for w in weights)


class Adapter(Protocol):
    """How one kind of layer is taken over and given back; all of it works on single instances."""

    kind: str

    def matches(self, module: nn.Module) -> bool:
        """Whether a module is a layer of this kind."""

    def shape(self, module: nn.Module) -> MoeShape:
        """Return its shape.

        Raises:
            UsageFault: The kernels do not compute what this module does; the message says why.
        """

    def attach(self, module: nn.Module, tuning: MoeTuning | None) -> int:
        """Take the layer over; return how many bytes of weights were laid anew, in place."""

    def detach(self, module: nn.Module) -> None:
        """Give the layer back as it was."""

    def outputs(self, module: nn.Module, probe: Probe) -> tuple[Tensor, Tensor]:
        """Return what the module's own code and the kernels make of a probe; it is attached."""


def is_a(module: nn.Module, source: str, name: str) -> bool:
    """Whether a module is of a class, known by its names: the class need not be imported."""
    return any((c.__module__, c.__qualname__) == (source, name) for c in type(module).__mro__)


def require_own(module: nn.Module, name: str) -> None:
    """Refuse a module whose method of a name was replaced on the instance, but not by us.

    Raises:
        UsageFault: Some hook stands there, of offloading for one; it would be lost.
    """
    if name in module.__dict__ and STATE not in module.__dict__:
        raise UsageFault(
            f"its {name} was replaced already, as hooks do: attach before they are put there"
        )


def plain_weight(module: nn.Module, name: str) -> Tensor:
    """Return a weight that the kernels can read.

    Raises:
        UsageFault: It is quantised, sharded, or of another dtype.
    """
    weight: Any = getattr(module, name, None)
    if type(weight) is not nn.Parameter:
        raise UsageFault(
            f"its {name} is no plain tensor but {type(weight).__name__}: attach before the model "
            "is quantised, sharded or given adapters, or leave this layer as it is"
        )
    if dispatch.dtype_name(weight.dtype) is None:
        raise UsageFault(f"its {name} is {weight.dtype}: bring it to bfloat16, float16 or float32")
    return weight


def shape_of(gate_up: torch.Size, top_k: int, dtype: torch.dtype) -> MoeShape:
    """Return the shape of a layer whose gate and up weights are [experts, 2 * inner, hidden]."""
    experts, both, hidden = gate_up
    name = dispatch.dtype_name(dtype)
    assert name is not None  # `plain_weight` saw to it
    return MoeShape(experts=experts, hidden=hidden, inner=both // 2, top_k=top_k, dtype=name)


def relaid(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a copy of a weight in another layout, outside of any graph and inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return change(tensor.detach())
