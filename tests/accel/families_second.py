"""Tiny random-weight transformers of diffusers 0.42.1, second half, with the inputs of one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Inputs = dict[str, Any]

# Seeds of the conditioning, far above the seeds of the steps.
TEXT, IMAGE, POOLED, CONTROL = 1000, 1001, 1002, 1003


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def latents(step: int, *shape: int) -> torch.Tensor:
    return noise(*shape, seed=0) + 0.1 * noise(*shape, seed=step + 1)


def moment(step: int, scale: float = 1000.0) -> torch.Tensor:
    return torch.tensor([scale * 0.95**step])


def text(width: int = 8) -> torch.Tensor:
    return noise(1, 5, width, seed=TEXT)


def grid(frames: int, height: int, width: int) -> torch.Tensor:
    sides = (torch.arange(frames), torch.arange(height), torch.arange(width))
    return torch.cartesian_prod(*sides)


def _kandinsky5(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 2, 4, 4, 4),  # channels last
        "encoder_hidden_states": text(),
        "timestep": moment(step),
        "pooled_projections": noise(1, 8, seed=POOLED),
        "visual_rope_pos": (torch.arange(2), torch.arange(2), torch.arange(2)),
        "text_rope_pos": torch.arange(5),
    }


def _kandinsky6(step: int) -> Inputs:
    condition = (noise(1, 2, 4, 4, 4, seed=IMAGE), torch.ones(1, 2, 4, 4, 1))
    return {
        "hidden_states": torch.cat([latents(step, 1, 2, 4, 4, 4), *condition], dim=-1),
        "encoder_hidden_states": text(),
        "pooled_projections": noise(1, 8, seed=POOLED),
        "timestep": moment(step),
        "audio_hidden_states": latents(step, 1, 6, 4),
    }


def _packed_image(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 16, 4),
        "encoder_hidden_states": text(),
        "timestep": moment(step, 1.0),
        "img_ids": grid(1, 4, 4),
        "txt_ids": torch.zeros(5, 3),
    }


def _ltx(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 8, 4),
        "encoder_hidden_states": text(),
        "timestep": moment(step),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "rope_interpolation_scale": (0.32, 32.0, 32.0),
    }


def _ltx2(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 8, 4),
        "audio_hidden_states": latents(step, 1, 6, 4),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": noise(1, 5, 8, seed=CONTROL),
        "timestep": moment(step),
        "num_frames": 2,
        "height": 2,
        "width": 2,
        "audio_num_frames": 6,
    }


def _minimax_h3(step: int) -> Inputs:
    # One packed sequence: 3 rows of text, 2 of audio, 8 of video.
    rows = torch.arange(13)
    tags = torch.tensor([1] * 3 + [2] * 2 + [0] * 8)
    places = torch.cat([rows[:5, None].expand(5, 3), grid(2, 2, 2) + 5])
    return {
        "hidden_states": latents(step, 1, 8, 8),
        "audio_hidden_states": latents(step, 1, 2, 4),
        "encoder_hidden_states": noise(1, 3, 8, seed=TEXT),
        "timestep": moment(step, 1.0),
        "timestep_indices": torch.zeros_like(rows),
        "token_tags": tags,
        "position_ids": places,
        "video_indices": rows[5:],
        "audio_indices": rows[3:5],
        "text_indices": rows[:3],
    }


def _mochi(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 4, 2, 4, 4),
        "encoder_hidden_states": text(),
        "timestep": moment(step),
        "encoder_attention_mask": torch.tensor([[True, True, True, True, False]]),
    }


def _motif(step: int) -> Inputs:
    condition = (noise(1, 4, 2, 4, 4, seed=CONTROL), torch.ones(1, 1, 2, 4, 4))
    return {
        "hidden_states": torch.cat([latents(step, 1, 4, 2, 4, 4), *condition], dim=1),
        "timestep": moment(step),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
        "image_embeds": noise(1, 3, 8, seed=IMAGE),
    }


def _nucleus(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 16, 16),
        "img_shapes": [(1, 4, 4)],
        "encoder_hidden_states": text(),
        "timestep": moment(step, 1.0),
    }


def _qwen(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 16, 16),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": torch.tensor([[True, True, True, True, False]]),
        "timestep": moment(step, 1.0),
        "img_shapes": [[(1, 4, 4)]],
    }


def _qwen21(step: int) -> Inputs:
    # A slot stands for 2x2 latents: one slot for the condition image, four for the target.
    return {
        "hidden_states": torch.cat([noise(1, 4, 4, seed=IMAGE), latents(step, 1, 16, 4)], dim=1),
        "encoder_hidden_states": text(),
        "timestep": moment(step, 1.0),
        "img_shapes": [[(1, 2, 2), (1, 4, 4)]],
        "img_mask": torch.tensor([[False, False, True, False, False] + [True] * 4]),
    }


def _sana_wm_refiner(step: int) -> Inputs:
    # The pipeline takes these angles from the model; any fixed ones of its width serve here.
    angles = torch.outer(torch.arange(8.0), 0.5 ** torch.arange(8.0)).repeat_interleave(2, dim=-1)
    return {
        "hidden_states": latents(step, 1, 8, 4),
        "encoder_hidden_states": text(),
        "timestep": moment(step).expand(1, 8),  # one per token
        "video_rotary_emb": (angles.cos()[None], angles.sin()[None]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
    }


def _wan(step: int) -> Inputs:
    return {
        "hidden_states": latents(step, 1, 4, 2, 4, 4),
        "timestep": moment(step),
        "encoder_hidden_states": text(),
    }


def _wan_animate(step: int) -> Inputs:
    # 5 face frames become 2 motion frames, and one more in front: as many as the latent frames.
    condition = noise(1, 8, 3, 4, 4, seed=CONTROL)
    return {
        "hidden_states": torch.cat([latents(step, 1, 4, 3, 4, 4), condition], dim=1),
        "timestep": moment(step),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_image": noise(1, 3, 8, seed=IMAGE),
        "pose_hidden_states": noise(1, 4, 2, 4, 4, seed=POOLED),
        "face_pixel_values": noise(1, 3, 5, 8, 8, seed=IMAGE),
    }


def _wan_vace(step: int) -> Inputs:
    return _wan(step) | {"control_hidden_states": noise(1, 8, 2, 4, 4, seed=CONTROL)}


# The three parts of a RoPE add up to the width of a head.
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_ROPE = (4, 6, 6)

_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 32,
    "num_text_blocks": 3,
    "num_visual_blocks": 3,
    "axes_dims": (4, 4, 4),
}

_PACKED_IMAGE = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 3,
    "num_single_layers": 3,
    "joint_attention_dim": 8,
    "axes_dims_rope": _ROPE,
}

# Cross attention reads the projected captions, so its width is that of the stream.
_LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "num_layers": 3,
    "caption_channels": 8,
}

_LTX2 = {
    **_LTX,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
}

_QWEN = {
    **_HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": 8,
    "axes_dims_rope": _ROPE,
}

_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}

SECOND: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    # It starts with all modulation at zero: until a test fills that in, a block changes nothing.
    "Kandinsky5Transformer3DModel": (_KANDINSKY, _kandinsky5),
    "Kandinsky6Transformer3DModel": (
        {
            **_KANDINSKY,
            "in_audio_dim": 4,
            "out_audio_dim": 4,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
        },
        _kandinsky6,
    ),
    "LongCatImageTransformer2DModel": (
        {**_PACKED_IMAGE, "pooled_projection_dim": 8},
        _packed_image,
    ),
    "LTXVideoTransformer3DModel": (_LTX, _ltx),
    "LTX2VideoTransformer3DModel": (_LTX2, _ltx2),
    "MiniMaxH3Transformer3DModel": (
        {
            **_HEADS,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 2,
            "audio_in_channels": 4,
            "text_dim": 8,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,  # turns 2 * 3 * 2 of the 16 channels
        },
        _minimax_h3,
    ),
    "MochiTransformer3DModel": (
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 8,  # pooled by 8 heads
            "time_embed_dim": 16,
        },
        _mochi,
    ),
    "MotifVideoTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 6,
            "num_decoder_layers": 3,
            "text_embed_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": _ROPE,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        _motif,
    ),
    # Dense: the weights of the experts are left uninitialised memory by the class.
    "NucleusMoEImageTransformer2DModel": (
        {
            **_QWEN,
            "num_key_value_heads": 1,
            "mlp_ratio": 6.0,  # 32 * 6 * 2 / 3 = 128: the class rounds down to a multiple of 128
            "dense_moe_strategy": "all_dense",
        },
        _nucleus,
    ),
    "OvisImageTransformer2DModel": ({**_PACKED_IMAGE, "out_channels": 4}, _packed_image),
    "QwenImageTransformer2DModel": (_QWEN, _qwen),
    "QwenImage21Transformer2DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "context_in_dim": 8,
            "mlp_ratio": 2,
            "axes_dims_rope": _ROPE,
        },
        _qwen21,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": (_LTX2, _sana_wm_refiner),
    "SkyReelsV2Transformer3DModel": (_WAN, _wan),
    "WanTransformer3DModel": (_WAN, _wan),
    "WanAnimateTransformer3DModel": (
        {
            **_WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 4,
            "image_dim": 8,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,  # after blocks 0 and 2
        },
        _wan_animate,
    ),
    "WanVACETransformer3DModel": (
        {**_WAN, "num_layers": 5, "vace_layers": [0, 2, 3], "vace_in_channels": 8},
        _wan_vace,
    ),
}

SECOND_LEFT_OUT: dict[str, str] = {}
