"""Tiny models with layers of experts, of transformers and diffusers, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HiDreamImageTransformer2DModel, NucleusMoEImageTransformer2DModel
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # of the largest value, through a whole model
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Model:
    """How a tiny model is built and called, and what its layers of experts are."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module], Tensor]
    kind: str
    layers: int
    experts: int
    inner: int
    top_k: int


def seeded(model: nn.Module) -> nn.Module:
    """Give every weight a small random value; some are made without any."""
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=source) * 0.15)
    return model.eval()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _mixtral() -> nn.Module:
    sizes: dict[str, Any] = {**_SIZES, "intermediate_size": 48, "num_local_experts": 4}
    return seeded(MixtralForCausalLM(MixtralConfig(**sizes)))


def _qwen() -> nn.Module:
    sizes: dict[str, Any] = {**_SIZES, "moe_intermediate_size": 24, "num_experts": 8}
    return seeded(Qwen3MoeForCausalLM(Qwen3MoeConfig(head_dim=16, **sizes)))


def _deepseek() -> nn.Module:
    sizes: dict[str, Any] = {
        **_SIZES,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    }
    return seeded(DeepseekV3ForCausalLM(DeepseekV3Config(**sizes)))


def gpt_oss() -> nn.Module:
    """Return a model whose experts the kernels do not compute."""
    sizes: dict[str, Any] = {**_SIZES, "intermediate_size": 32, "num_local_experts": 4}
    return seeded(GptOssForCausalLM(GptOssConfig(head_dim=16, layer_types=None, **sizes)))


def _hidream() -> nn.Module:
    return seeded(
        HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[8, 8],
            text_emb_dim=8,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(8, 8),
            llama_layers=[0, 1],
        )
    )


def _nucleus() -> nn.Module:
    return seeded(
        NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            attention_head_dim=16,
            joint_attention_dim=8,
            axes_dims_rope=(4, 6, 6),
            mlp_ratio=6.0,
            dense_moe_strategy="leave_first_block_dense",
            num_experts=4,
            moe_intermediate_dim=24,
            capacity_factors=2.0,
        )
    )


def _says(model: nn.Module) -> Tensor:
    tokens = torch.arange(24).view(2, 12) * 5 % 64
    logits: Tensor = model(tokens).logits
    return logits


def _paints(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    image: Tensor = model(
        noise(2, 4, 8, 8).to(dtype),
        timesteps=torch.tensor([500.0, 500.0]).to(dtype),
        encoder_hidden_states_t5=noise(2, 3, 8).to(dtype),
        encoder_hidden_states_llama3=[noise(2, 3, 8).to(dtype), noise(2, 3, 8).to(dtype)],
        pooled_embeds=noise(2, 8).to(dtype),
        return_dict=False,
    )[0]
    return image


def _nucleus_paints(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    image: Tensor = model(
        hidden_states=noise(1, 16, 16).to(dtype),
        img_shapes=[(1, 4, 4)],
        encoder_hidden_states=noise(1, 5, 8).to(dtype),
        timestep=torch.tensor([0.5]).to(dtype),
        return_dict=False,
    )[0]
    return image


MODELS = {
    "mixtral": Model(_mixtral, _says, "transformers experts", 2, 4, 48, 2),
    "qwen": Model(_qwen, _says, "transformers experts", 2, 8, 24, 2),
    "deepseek": Model(_deepseek, _says, "transformers experts", 1, 8, 16, 2),
    "hidream": Model(_hidream, _paints, "HiDream experts", 2, 4, 256, 2),
    "nucleus": Model(_nucleus, _nucleus_paints, "NucleusMoE experts", 1, 4, 24, 1),
}


def off(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()
