"""The one file that touches diffusers' private names; everything else goes through it.

Tested with diffusers 0.42.1. An older one is refused with a sentence instead of failing somewhere
inside a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
_GROUP_OFFLOADING = "group_offloading"


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
        self.compiled: Callable[..., Any] | None = None

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

    def whole(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run that forward, compiled if the module was compiled as a whole.

        Tensors of a compiled forward may be memory of a CUDA graph, which the next one overwrites:
        what outlives a forward must be a copy.
        """
        if self.compiled is None:
            return self.original(*args, **kwargs)
        hooked = module.forward
        module.forward = self.fn_ref.original_forward
        try:
            return self.compiled(*args, **kwargs)
        finally:
            module.forward = hooked

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Called by diffusers in place of the module's forward."""
        self.take_compiled(module)
        return self.around(module, args, kwargs)

    def take_compiled(self, module: nn.Module) -> None:
        """Move the compiled call of a module inside the hook, so that the hook is not compiled."""
        if module._compiled_call_impl is not None:
            self.compiled = module._compiled_call_impl
            module._compiled_call_impl = None

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


def uncompiled(module: nn.Module) -> Callable[..., Any]:
    """Return what calls a module without the code that `module.compile()` made of it."""
    if module._compiled_call_impl is None:
        return module
    call: Callable[..., Any] = module._call_impl
    return call


def moved_by(model: nn.Module) -> str | None:
    """Return which call of diffusers made a model's weights move by themselves, None if none."""
    if getattr(model, "_hf_hook", None) is not None:
        return "enable_model_cpu_offload"
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(_GROUP_OFFLOADING) is not None:
            return "enable_group_offload"
    return None


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
    hook.take_compiled(module)
    registry.invalidate_child_registries_cache()  # else a model that ran before gives no context


def detach(module: nn.Module, name: str = HOOK_NAME) -> None:
    """Take a hook off again; the module's original forward is back."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    hook = registry.get_hook(name)
    if isinstance(hook, ForwardHook) and hook.compiled is not None:
        module._compiled_call_impl = hook.compiled
    registry.remove_hook(name, recurse=False)
    registry.invalidate_child_registries_cache()


def is_compiled(model: nn.Module) -> bool:
    """Whether a module or a part of it is compiled, with or without a hook around it."""
    registry = getattr(model, "_diffusers_hook", None)
    hooks = registry.hooks.values() if registry is not None else ()
    return any(getattr(hook, "compiled", None) is not None for hook in hooks) or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )


@dataclass(frozen=True)
class Output:
    """What a denoiser returned, as one tensor, and how to give it back in the same form.

    Several tensors (video and audio, say) are laid end to end in one flat tensor.
    """

    sample: Tensor
    rebuild: Callable[[Tensor], Any]

    @classmethod
    def of(cls, returned: Any) -> Output:
        """Take a denoiser's output apart: a tensor, or tuples, lists and outputs of them.

        Raises:
            UsageFault: There is no tensor in it.
        """
        found = list(tensors_of(returned))
        if not found:
            raise UsageFault(
                f"the denoiser returned {type(returned).__name__} without a tensor: caches cannot "
                "stand in for it"
            )
        if len(found) == 1:
            return cls(found[0], lambda sample: _rebuilt(returned, iter([sample])))
        shapes = [tensor.shape for tensor in found]
        sizes = [tensor.numel() for tensor in found]

        def rebuild(flat: Tensor) -> Any:
            parts = [p.reshape(s) for p, s in zip(flat.split(sizes), shapes, strict=True)]
            return _rebuilt(returned, iter(parts))

        return cls(torch.cat([tensor.flatten() for tensor in found]), rebuild)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):  # outputs of diffusers are dictionaries, too
        for each in value.values():
            yield from tensors_of(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_of(each)


def _rebuilt(template: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a nested value of the template's form with other tensors in it."""
    if isinstance(template, Tensor):
        return next(tensors)
    if isinstance(template, dict):
        return type(template)(**{name: _rebuilt(each, tensors) for name, each in template.items()})
    if isinstance(template, tuple | list):
        return type(template)(_rebuilt(each, tensors) for each in template)
    return template


def latents_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the latents that a denoiser was called with: its first tensor.

    Raises:
        UsageFault: It was called without any tensor.
    """
    named = kwargs.get("hidden_states")
    found = named if isinstance(named, Tensor) else next(tensors_of((args, kwargs)), None)
    if found is None:
        raise UsageFault("the denoiser was called without a tensor: ditune finds no latents")
    return found


def second_half(value: Any, batch: int) -> Any:
    """Return arguments cut to the second half of a batch, in which guidance has the prompts.

    Tensors whose first dimension is the batch are cut, inside tuples, lists and dictionaries too.
    """
    if isinstance(value, Tensor):
        cut = value.ndim > 0 and len(value) == batch
        return value[batch // 2 :] if cut else value
    if isinstance(value, dict):
        return {name: second_half(each, batch) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(second_half(each, batch) for each in value)
    return value


def active_attention_backend() -> str:
    """Return the name of the attention implementation that diffusers dispatches to."""
    return str(_AttentionBackendRegistry.get_active_backend()[0].value)
