"""Load the shipped miniature, offline, from the package's own folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
from transformers.utils import logging as transformers_logging

from ditune.db.errors import UsageFault
from ditune.miniature import architecture
from ditune.miniature.architecture import TEXT_TOKENS, Size
from ditune.miniature.language import captions

WEIGHTS = Path(__file__).parent / "weights"
_FOLDERS: dict[Size, str] = {"large": "transformer", "small": "transformer_small"}

# The reference setting. The codec does not compress time, and WanPipeline then rounds any number of
# frames up by one: 12 asks for 13.
CALL: MappingProxyType[str, Any] = MappingProxyType(
    {
        "height": 32,
        "width": 32,
        "num_frames": 12,
        "num_inference_steps": 50,
        "guidance_scale": 6.0,
        "negative_prompt": "",
        "max_sequence_length": TEXT_TOKENS,
    }
)


def load(size: Size = "large") -> WanPipeline:
    """Return the miniature as a `WanPipeline` on the CPU in float32, to be called with `CALL`.

    Raises:
        UsageFault: The size is unknown, or the weights are not in the package.
    """
    pipe = architecture.pipeline(
        load_transformer(size),
        UMT5EncoderModel.from_pretrained(WEIGHTS / "text_encoder").eval(),
        AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", torch_dtype=torch.float32).eval(),
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WEIGHTS / "tokenizer")
    pipe.register_modules(tokenizer=tokenizer)
    return pipe


def load_transformer(size: Size) -> WanTransformer3DModel:
    """Return one of the two denoisers alone."""
    if size not in _FOLDERS:
        raise UsageFault(f'the miniature has no size {size!r}: it is "large" or "small"')
    folder = WEIGHTS / _FOLDERS[size]
    if not folder.is_dir():
        raise UsageFault(
            f"the miniature's weights are missing at {folder}: reinstall ditune, "
            "or train them with python -m ditune.miniature.train"
        )
    transformers_logging.disable_progress_bar()
    model = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class MiniatureSource:
    """The miniature as something that can be tuned: pipeline, small sibling, prompts, arguments."""

    name: str = "miniature"
    pipe: WanPipeline = field(default_factory=load)
    small: nn.Module | None = field(default_factory=lambda: load_transformer("small"))
    call: dict[str, Any] = field(default_factory=lambda: dict(CALL))
    calibration: tuple[str, ...] = field(default_factory=lambda: tuple(captions("calibration")))
    held_out: tuple[str, ...] = field(default_factory=lambda: tuple(captions("held-out")))
    quality: str = "psnr>=35,psnr_worst>=27"
