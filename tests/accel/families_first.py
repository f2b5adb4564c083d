"""Tiny random-weight transformers of diffusers, first half: what builds one and what it takes.

Every class is exported by `diffusers` itself. All inputs are one sample in float32 on the CPU.
Within one class the lists of blocks differ in length where the class allows it, so that a block of
one list is never mistaken for a block of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]

TEXT_TOKENS = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TWO_LISTS = {**HEADS, "num_layers": 3, "num_single_layers": 4}
CHANNELS = {"in_channels": 4, "out_channels": 4}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _latents(step: int, *shape: int) -> torch.Tensor:
    return noise(*shape) + 0.1 * noise(*shape, seed=step + 1)


def _video(step: int) -> torch.Tensor:
    return _latents(step, 1, 4, 2, 4, 4)


def _time(step: int, top: float = 1000.0) -> torch.Tensor:
    return torch.tensor([top * (1 - step / 50)])


def _text() -> torch.Tensor:
    return noise(1, TEXT_TOKENS, 8, seed=1001)


def _text_mask() -> torch.Tensor:
    """Mark the last text token as padding."""
    return (torch.arange(TEXT_TOKENS) < TEXT_TOKENS - 1).long()[None]


def _grid(*sizes: int) -> torch.Tensor:
    """Positions of a grid of tokens: one row per token, one column per axis."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def _angles(positions: int, dim: int) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.outer(torch.arange(positions).float(), frequencies)


def _ace_step(step: int) -> Inputs:
    time = _time(step, 1.0)
    return {
        "hidden_states": _latents(step, 1, 16, 4),
        "timestep": time,
        "timestep_r": time,
        "encoder_hidden_states": _text(),
        "context_latents": noise(1, 16, 8, seed=1002),
    }


def _cogvideox(step: int) -> Inputs:
    angles = _angles(8, 8).repeat_interleave(2, dim=1)  # 8 tokens, 8 channels a head
    return {
        "hidden_states": _video(step).transpose(1, 2),  # frames come before channels
        "encoder_hidden_states": _text(),
        "timestep": _time(step),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _video_and_text(step: int) -> Inputs:
    return {
        "hidden_states": _video(step),
        "encoder_hidden_states": _text(),
        "timestep": _time(step),
    }


def _allegro(step: int) -> Inputs:
    angles = _angles(2, 4).repeat(1, 2)  # 2 positions an axis, 4 channels of a head each
    table = (angles.cos(), angles.sin())
    positions = _grid(2, 2, 2).T[:, None].contiguous()
    return {
        **_video_and_text(step),
        "encoder_attention_mask": _text_mask(),
        "image_rotary_emb": ((table, table, table), tuple(positions)),
    }


def _bria(step: int) -> Inputs:
    return {
        "hidden_states": _latents(step, 1, 16, 8),
        "encoder_hidden_states": _text(),
        "timestep": _time(step),
        "img_ids": _grid(1, 4, 4),
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
    }


def _chroma(step: int) -> Inputs:
    # a float mask over text and image tokens, as the pipeline makes it: it is added to the scores
    mask = torch.cat([_text_mask(), torch.ones(1, 16)], dim=1)
    return {**_bria(step), "timestep": _time(step, 1.0), "attention_mask": mask}


def _flux(step: int) -> Inputs:
    return {
        **_bria(step),
        "timestep": _time(step, 1.0),
        "pooled_projections": noise(1, 8, seed=1002),
        "guidance": torch.tensor([3.5]),
    }


def _flux2(step: int) -> Inputs:
    return {
        **_bria(step),
        "timestep": _time(step, 1.0),
        "img_ids": _grid(1, 4, 4, 1),
        "txt_ids": _grid(1, 1, 1, TEXT_TOKENS),
        "guidance": torch.tensor([4.0]),
    }


def _glm_image(step: int) -> Inputs:
    return {
        "hidden_states": _latents(step, 1, 4, 8, 8),
        "encoder_hidden_states": _text(),
        "prior_token_id": torch.arange(16)[None],  # one for each of the 4 x 4 patches
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
        "timestep": _time(step),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def _cogview4(step: int) -> Inputs:
    return {
        "hidden_states": _latents(step, 1, 4, 8, 8),
        "encoder_hidden_states": _text(),
        "timestep": _time(step),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def _cosmos3(step: int) -> Inputs:
    """Text tokens, then the 8 patches of two noisy frames, packed into one sequence."""
    text, vision = torch.arange(TEXT_TOKENS), TEXT_TOKENS + torch.arange(8)
    grid = _grid(2, 2, 2).T + TEXT_TOKENS
    return {
        "input_ids": text,
        "text_indexes": text,
        "position_ids": torch.cat([text.expand(3, -1), grid], dim=1),
        "und_len": TEXT_TOKENS,
        "sequence_length": TEXT_TOKENS + 8,
        "vision_tokens": [_video(step)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": vision,
        "vision_mse_loss_indexes": vision,
        "vision_timesteps": _time(step).expand(8),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


def _helios(step: int) -> Inputs:
    return {
        **_video_and_text(step),
        "indices_hidden_states": torch.arange(8, 10)[None],
        "indices_latents_history_short": torch.arange(6, 8)[None],
        "indices_latents_history_mid": torch.arange(4, 6)[None],
        "indices_latents_history_long": torch.arange(4)[None],
        "latents_history_short": noise(1, 4, 2, 4, 4, seed=1002),
        "latents_history_mid": noise(1, 4, 2, 4, 4, seed=1003),
        "latents_history_long": noise(1, 4, 4, 4, 4, seed=1004),
    }


def _hunyuan_video(step: int) -> Inputs:
    return {
        **_video_and_text(step),
        "encoder_attention_mask": _text_mask(),
        "pooled_projections": noise(1, 8, seed=1002),
        "guidance": torch.tensor([6000.0]),  # the scale of 6, times 1000
    }


def _hunyuan_video15(step: int) -> Inputs:
    return {
        **_video_and_text(step),
        "encoder_attention_mask": _text_mask(),
        "encoder_hidden_states_2": noise(1, 4, 8, seed=1002),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 1, 0]]),
        "image_embeds": noise(1, 3, 8, seed=1003),
    }


def _framepack(step: int) -> Inputs:
    return {
        **_hunyuan_video(step),
        "image_embeds": noise(1, 3, 8, seed=1003),
        "indices_latents": torch.arange(8, 10),
        # every history is needed: forward reads the rotary embedding of each of them
        "latents_clean": noise(1, 4, 2, 4, 4, seed=1004),
        "indices_latents_clean": torch.arange(6, 8),
        "latents_history_2x": noise(1, 4, 2, 4, 4, seed=1005),
        "indices_latents_history_2x": torch.arange(4, 6),
        "latents_history_4x": noise(1, 4, 4, 4, 4, seed=1006),
        "indices_latents_history_4x": torch.arange(4),
    }


def _hunyuan_image(step: int) -> Inputs:
    return {
        "hidden_states": _latents(step, 1, 4, 4, 4),
        "timestep": _time(step),
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": _text_mask(),
    }


# the axes of a rotary embedding add up to the 8 channels of a head
FLUX = {**TWO_LISTS, "in_channels": 8, "joint_attention_dim": 8, "axes_dims_rope": (4, 2, 2)}
HUNYUAN = {
    **HEADS,
    **CHANNELS,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "rope_axes_dim": (4, 2, 2),
}
HUNYUAN_VIDEO = {**HUNYUAN, "num_single_layers": 4, "pooled_projection_dim": 8}
WAN = {**CHANNELS, "num_layers": 3, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32}
COGVIEW = {
    **HEADS,
    **CHANNELS,
    "num_layers": 3,
    "text_embed_dim": 8,
    "time_embed_dim": 16,
    "condition_dim": 4,
}

FIRST: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    "AceStepTransformer1DModel": (
        {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,  # two with a sliding window, two without
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,  # the 4 of the latents and the 8 of the context
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
            "encoder_hidden_size": 8,
        },
        _ace_step,
    ),
    "AllegroTransformer3DModel": (
        {
            **CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,  # three axes of an even width
            "num_layers": 3,
            "cross_attention_dim": 24,  # the inner width: captions are projected to it
            "caption_channels": 8,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": 2,
        },
        _allegro,
    ),
    "BriaTransformer2DModel": (FLUX, _bria),
    "ChromaTransformer2DModel": (
        {
            **FLUX,
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 16,
            "approximator_layers": 3,
        },
        _chroma,
    ),
    "ChronoEditTransformer3DModel": (
        {**WAN, "num_attention_heads": 2, "attention_head_dim": 12},  # three axes of an even width
        _video_and_text,
    ),
    "CogVideoXTransformer3DModel": (
        {
            **HEADS,
            **CHANNELS,
            "num_layers": 3,
            "time_embed_dim": 16,
            "text_embed_dim": 8,
            "use_rotary_positional_embeddings": True,
        },
        _cogvideox,
    ),
    "CogView4Transformer2DModel": ({**COGVIEW, "rope_axes_dim": (8, 8)}, _cogview4),
    "Cosmos3OmniTransformer": (
        {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "latent_channel": 4,
            "patch_latent_dim": 16,  # 4 channels of 2 x 2 patches
            "vocab_size": 16,
            "rope_axes_dim": (2, 1, 1),  # adds up to half a head
        },
        _cosmos3,
    ),
    "Flux2Transformer2DModel": (
        {**FLUX, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16},
        _flux2,
    ),
    "FluxTransformer2DModel": (
        {**FLUX, "pooled_projection_dim": 8, "guidance_embeds": True},
        _flux,
    ),
    "GlmImageTransformer2DModel": (
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        _glm_image,
    ),
    "HeliosTransformer3DModel": ({**HEADS, **WAN, "rope_dim": (4, 2, 2)}, _helios),
    "HunyuanImageTransformer2DModel": (
        {**HUNYUAN, "num_single_layers": 4, "rope_axes_dim": (4, 4)},
        _hunyuan_image,
    ),
    "HunyuanVideo15Transformer3DModel": (
        {**HUNYUAN, "text_embed_2_dim": 8, "image_embed_dim": 8},
        _hunyuan_video15,
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {
            **HUNYUAN_VIDEO,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    "HunyuanVideoTransformer3DModel": (HUNYUAN_VIDEO, _hunyuan_video),
    "LatteTransformer3DModel": (
        {
            **HEADS,
            **CHANNELS,
            "num_layers": 3,
            "cross_attention_dim": 16,  # the inner width: captions are projected to it
            "attention_bias": True,
            "sample_size": 4,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 8,
            "video_length": 2,
        },
        _video_and_text,
    ),
}

FIRST_LEFT_OUT: dict[str, str] = {}
