"""The small model of a family, ready to be asked in the large one's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ditune.accel.conversion import Conversion, NoiseSchedule
from ditune.accel.internals import Output, latents_of, moved_by, uncompiled
from ditune.accel.pairs import configs_of, converted, require_pair
from ditune.accel.spans import BlockStack
from ditune.db.errors import UsageFault

_CONTROL_SCALES = "control_hidden_states_scale"


class Sibling:
    """Takes what the large model was called with and answers in its terms."""

    def __init__(self, model: nn.Module, conversion: Conversion | None = None) -> None:
        """Stand in as the model is, or by conversion of every forward."""
        self.model = model
        self._conversion = conversion
        config = getattr(model, "config", {})
        self._control_layers = len(config.get("vace_layers") or ())
        self._rotates = bool(config.get("use_rotary_positional_embeddings", True))

    @classmethod
    def of(cls, pipe: Any, small: Any) -> Sibling:
        """Prepare the small model of a pipeline.

        Args:
            pipe: The large model's pipeline.
            small: A transformer, or its pipeline: where schedules or latent scales of a family
                differ, only that knows them.

        Raises:
            UsageFault: It cannot take over; every field in which the two differ is named.
        """
        model = getattr(small, "transformer", small)
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise UsageFault(
                "a small model is a diffusers transformer or a pipeline with one, not a "
                f"{type(small).__name__}: give small=pipe.transformer or small=pipe"
            )
        large_configs, small_configs = configs_of(pipe), configs_of(small)
        names = (type(pipe).__name__, type(small).__name__)
        require_pair(large_configs, small_configs, names)
        _require_alike(getattr(pipe, "transformer", None) or pipe, model)
        if not converted(large_configs, small_configs):
            return cls(model)
        return cls(model, Conversion(_schedule(pipe), _schedule(small)))

    def runner(self, stack: BlockStack) -> Callable[..., Any]:
        """Return what runs it: uncompiled where blocks are stood in for, which no graph holds."""

        def run(*args: Any, **kwargs: Any) -> Any:
            model = uncompiled(self.model) if stack.replaced else self.model
            return self._answer(model, args, kwargs)

        return run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the large model might have returned."""
        return self._answer(self.model, args, kwargs)

    def _answer(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        kwargs = self._scaled(kwargs)
        if self._conversion is None:
            return model(*args, **kwargs)
        latents, timestep = latents_of(args, kwargs), kwargs["timestep"]
        asked, at = self._conversion.asked(latents, timestep)
        given = {**kwargs, "hidden_states": asked, "timestep": at}
        if not self._rotates:
            given["image_rotary_emb"] = None
        output = Output.of(model(**given))
        return output.rebuild(self._conversion.answered(latents, timestep, output.sample))

    def _scaled(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return arguments with VACE's control scales for as many layers as this model has.

        The pipeline gives one for each of the large model's; each layer here takes the one of the
        same relative depth.
        """
        layers, scales = self._control_layers, kwargs.get(_CONTROL_SCALES)
        if not layers or not isinstance(scales, Tensor) or len(scales) == layers:
            return kwargs
        depths = [round(i * (len(scales) - 1) / max(layers - 1, 1)) for i in range(layers)]
        return {**kwargs, _CONTROL_SCALES: torch.stack([scales[depth] for depth in depths])}

    def require_on(self, device: torch.device) -> None:
        """Refuse a call on a device that the weights are not on, before its first step.

        Raises:
            UsageFault: They are elsewhere.
        """
        found = next(self.model.parameters()).device
        if found != device and moved_by(self.model) is None:
            raise UsageFault(
                f"the small model is on {found} and the pipeline runs on {device}: move it there, "
                'or let it come when it is needed with accelerate(..., offload="lazy")'
            )


def _require_alike(large: Any, small: nn.Module) -> None:
    """Refuse a small model that computes in another floating-point type.

    Quantised models may be mixed: they do not say in what they compute.
    """
    if any("quantization_config" in getattr(model, "config", {}) for model in (large, small)):
        return
    found = [getattr(model, "dtype", None) for model in (large, small)]
    floating = [dtype for dtype in found if dtype is not None and dtype.is_floating_point]
    if len(set(floating)) == 2:
        raise UsageFault(
            f"the small model is in {floating[1]} and the large one in {floating[0]}: load it "
            f"with torch_dtype={floating[0]}"
        )


def _schedule(pipe: Any) -> NoiseSchedule:
    signal: Tensor = pipe.scheduler.alphas_cumprod
    return NoiseSchedule(signal.double().tolist(), float(pipe.vae.config.scaling_factor))
