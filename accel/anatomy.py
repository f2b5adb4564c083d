"""Where things are in a diffusion transformer, found by structure instead of by a list of names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ditune.db.errors import UsageFault


def denoisers(pipe: Any) -> list[nn.Module]:
    """Return the pipeline's denoising transformers, the high-noise expert first.

    Raises:
        UsageFault: The pipeline has none.
    """
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    models = [model for model in found if isinstance(model, nn.Module)]
    if not models:
        raise UsageFault(
            f"{type(pipe).__name__} has no transformer: ditune accelerates diffusion transformers, "
            "pass a pipeline that has one as `transformer`"
        )
    return models


class BlockStack:
    """The list of blocks that a denoiser runs one after the other."""

    def __init__(self, model: nn.Module) -> None:
        """Find the longest list of equal blocks among the model's direct children.

        Raises:
            UsageFault: There is no such list.
        """
        lists = {
            name: child
            for name, child in model.named_children()
            if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
        }
        if not lists:
            raise UsageFault(
                f"{type(model).__name__} has no list of repeated blocks among its children: "
                "ditune cannot see inside it"
            )
        self.model = model
        self.name = max(lists, key=lambda name: len(lists[name]))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks as they stand in the model now."""
        blocks = self.model.get_submodule(self.name)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def __len__(self) -> int:
        """Return how many blocks there are."""
        return len(self.blocks)

    @contextmanager
    def replaced(self, runner: SpanRunner) -> Iterator[None]:
        """Let `runner` stand in for the whole list; the blocks themselves are never touched.

        Regional compilation keeps its graphs, because no block gains a hook or a branch.
        """
        blocks = self.model._modules[self.name]
        self.model._modules[self.name] = nn.ModuleList([runner])
        try:
            yield
        finally:
            self.model._modules[self.name] = blocks


class SpanRunner(nn.Module):
    """Run a stack of blocks, and either record or replace the residual of its middle span.

    The span leaves out `fn` blocks at the front and `bn` at the back. With `replacement` the span's
    blocks do not run and the residual is added instead; without it everything runs and `span` and
    `stack` hold the residuals of the span and of the whole stack.
    """

    def __init__(
        self, blocks: nn.ModuleList, fn: int, bn: int, replacement: Tensor | None = None
    ) -> None:
        """Prepare one pass over the blocks."""
        super().__init__()
        self._blocks = list(blocks)  # a plain list: the model keeps owning its blocks
        self._front = min(fn, len(self._blocks))
        self._back = max(self._front, len(self._blocks) - bn)
        self._replacement = replacement
        self.span: Tensor | None = None
        self.stack: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the stack as the model's own loop would."""
        entered = hidden_states
        hidden_states = self._run(self._blocks[: self._front], hidden_states, args, kwargs)
        before = hidden_states
        if self._replacement is not None:
            hidden_states = before + self._replacement
        else:
            middle = self._blocks[self._front : self._back]
            hidden_states = self._run(middle, before, args, kwargs)
            self.span = hidden_states - before
        hidden_states = self._run(self._blocks[self._back :], hidden_states, args, kwargs)
        if self._replacement is None:
            whole = self._front == 0 and self._back == len(self._blocks)
            self.stack = self.span if whole else hidden_states - entered
        return hidden_states

    @staticmethod
    def _run(
        blocks: list[nn.Module], hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        for block in blocks:
            hidden = block(hidden, *args, **kwargs)
            if not isinstance(hidden, Tensor):
                raise UsageFault(
                    f"{type(block).__name__} returns {type(hidden).__name__}: block and "
                    "hidden-state reuse need blocks that take and return one tensor"
                )
        return hidden
