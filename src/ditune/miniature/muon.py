"""Muon, the optimiser of the denoisers' weight matrices, in single precision.

`torch.optim.Muon` orthogonalises in bfloat16, matrix by matrix. On a CPU without bfloat16
arithmetic that took 73 % of a training step of the shallow model (2.97 of 4.08 s in a profile on
one AVX2 core); in float32 and with equal shapes together it took 0.24 s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steepest at zero; singular values end near 0.7 to 1.2
_SMALLEST = 1e-7


class Muon(Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied.

    Source: Keller Jordan's Muon, with the learning-rate scale of its first version.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        iterations: int = 4,
    ) -> None:
        """Take the matrices to train.

        Args:
            matrices: Parameters of two dimensions.
            lr: Learning rate; an update has about this spectral norm.
            weight_decay: Share of a weight that is taken off per unit of learning rate.
            momentum: Of the running mean of gradients (Nesterov).
            iterations: Of Newton and Schulz.

        Raises:
            ValueError: A parameter is no matrix.
        """
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(matrices, defaults)
        self.iterations = iterations
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon trains matrices, not shape {tuple(parameter.shape)}")

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Apply one update, matrices of one shape together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for (rows, columns), parameters in alike.items():
                rate = group["lr"] * max(1.0, rows / columns) ** 0.5
                updates = self._updates(self._directions(parameters, group["momentum"]))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=rate)
        return loss

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> Tensor:
        """Return gradients with momentum, looked ahead, [n, rows, columns]."""
        directions = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1.0 - momentum)
            directions.append(parameter.grad.lerp(state["momentum"], momentum))
        return torch.stack(directions)

    def _updates(self, directions: Tensor) -> Tensor:
        """Return directions made orthogonal; of several processes, each does a part."""
        if not distributed.is_initialized():
            return orthogonal(directions, self.iterations)
        mine = slice(distributed.get_rank(), None, distributed.get_world_size())
        updates = torch.zeros_like(directions)
        updates[mine] = orthogonal(directions[mine], self.iterations)
        distributed.all_reduce(updates)
        return updates


def orthogonal(matrices: Tensor, iterations: int) -> Tensor:
    """Return matrices [n, rows, columns] with all singular values pushed towards one.

    Source: the quintic Newton-Schulz iteration of Muon.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    found = matrices if wide else matrices.mT
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp_min(_SMALLEST)
    for _ in range(iterations):
        gram = found @ found.mT
        found = torch.baddbmm(
            found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a
        )
    return found if wide else found.mT
