"""The one file that touches diffusers' private names; everything else goes through it.

Tested with diffusers 0.42.1. An older one is refused with a sentence instead of failing somewhere
inside a generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from packaging.version import Version
from torch import Tensor, nn

from ditune.db.errors import UsageFault

OLDEST = Version("0.42.0")
TESTED = Version("0.42.1")
HOOK_NAME = "ditune"


@dataclass(frozen=True)
class Context:
    """What a pipeline says about one forward; None where it says nothing."""

    branch: str
    step: int | None
    steps: int | None
    sigma: float | None


class _NoState(BaseState):  # type: ignore[misc]  # diffusers' names count as Any
    """The state object that diffusers' manager insists on; ours lives in the episode."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget nothing: there is nothing here."""


class ForwardHook(ModelHook):  # type: ignore[misc]  # likewise
    """A hook around a denoiser's forward that knows the pipeline's context.

    Subclasses implement `around`. diffusers sets the context on every `StateManager` attribute of a
    stateful hook, which is the only reason that one stands here.
    """

    _is_stateful = True

    def __init__(self) -> None:
        """Create a hook that is attached to nothing yet."""
        super().__init__()
        self.manager = StateManager(_NoState)

    def context(self) -> Context | None:
        """Return what the pipeline said about the forward that is running, None if nothing."""
        try:
            seen = self.manager.context
        except ValueError:
            return None
        return Context(seen.name, seen.step_index, seen.num_inference_steps, seen.sigma)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward that the hook stands around."""
        return self.fn_ref.original_forward(*args, **kwargs)

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the module's forward."""
        return self.around(module, args, kwargs)

    def around(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do the work of one forward."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does around a forward")

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by diffusers at the end of a successful pipeline call."""
        self.manager.reset()
        self.finish()
        return module

    def finish(self) -> None:
        """Forget everything that belongs to one pipeline call."""


def require_supported() -> None:
    """Refuse a diffusers whose hooks are older than those that ditune was written for.

    Raises:
        UsageFault: The installed version is too old.
    """
    found = Version(diffusers.__version__)
    if found < OLDEST:
        raise UsageFault(
            f"ditune needs diffusers {OLDEST} or newer for its hooks and found {found}: "
            f'run pip install "diffusers>={OLDEST}"'
        )


def attach(module: nn.Module, hook: ForwardHook, name: str = HOOK_NAME) -> None:
    """Put a hook around a module's forward, outermost, on this instance only."""
    require_supported()
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(name) is not None:
        raise UsageFault(
            f"this {type(module).__name__} already carries a ditune hook: "
            "call .remove() on the earlier result of accelerate() first"
        )
    registry.register_hook(hook, name)
    registry.invalidate_child_registries_cache()  # else a model that ran before gives no context


def detach(module: nn.Module, name: str = HOOK_NAME) -> None:
    """Take a hook off again; the module's original forward is back."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()


def sample_of(output: Any) -> Tensor:
    """Return the tensor of a denoiser's output, be it a tuple or a diffusers output class."""
    sample = output[0]
    if not isinstance(sample, torch.Tensor):
        raise UsageFault(
            f"the denoiser returned {type(sample).__name__} where ditune expects one tensor: "
            "models with several outputs are not supported by caches"
        )
    return sample


def output_like(sample: Tensor, kwargs: dict[str, Any]) -> Any:
    """Wrap a tensor as the denoiser would have, by the caller's `return_dict`."""
    if kwargs.get("return_dict", True):
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=sample)
    return (sample,)


def active_attention_backend() -> str:
    """Return the name of the attention implementation that diffusers dispatches to."""
    return str(_AttentionBackendRegistry.get_active_backend()[0].value)
