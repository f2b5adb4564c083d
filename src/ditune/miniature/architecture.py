"""The parts of the miniature, built from their configurations as diffusers and transformers do.

Everything that decides a shape stands here, so that training and loading cannot disagree.
"""

from __future__ import annotations

from typing import Literal

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ditune.miniature.language import COLOUR_NAMES, DIGITS, MOTIONS

Size = Literal["large", "small"]
Z_DIM = 16
PATCH = 8  # pixels on a side that one latent position covers
TEXT_TOKENS = 8  # captions have at most six; WanPipeline pads with zeros up to this length
TEXT_DIM = 64
FLOW_SHIFT = 8.0  # what Wan 2.1 recommends for its 1.3B model is 8 to 12
TRANSFORMERS: dict[Size, dict[str, int]] = {
    "large": {"num_attention_heads": 4, "ffn_dim": 512, "num_layers": 40},
    "small": {"num_attention_heads": 3, "ffn_dim": 384, "num_layers": 5},
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the captions; it ends every caption with `</s>`."""
    words = sorted({word for motion in MOTIONS for word in motion.split()})
    vocabulary = ["<pad>", "</s>", "<unk>", "a", *COLOUR_NAMES, *map(str, DIGITS), *words]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def text_encoder() -> UMT5EncoderModel:
    """Return an untrained text encoder: two layers, 64 wide."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer()),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def vae(latents_mean: list[float], latents_std: list[float]) -> AutoencoderKLWan:
    """Return an untrained video VAE: 8x8 pixels to 16 channels, no temporal compression."""
    return AutoencoderKLWan(
        base_dim=48,
        z_dim=Z_DIM,
        dim_mult=[1],
        num_res_blocks=0,
        temperal_downsample=[],
        patch_size=PATCH,
        in_channels=3 * PATCH * PATCH,
        out_channels=3 * PATCH * PATCH,
        scale_factor_temporal=1,
        scale_factor_spatial=PATCH,
        latents_mean=latents_mean,
        latents_std=latents_std,
    )


def transformer(size: Size, num_layers: int | None = None) -> WanTransformer3DModel:
    """Return an untrained denoiser; `num_layers` replaces the depth of the shipped one."""
    sizes = TRANSFORMERS[size]
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=sizes["num_attention_heads"],
        attention_head_dim=32,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=sizes["ffn_dim"],
        num_layers=num_layers or sizes["num_layers"],
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the flow-matching scheduler that both denoisers share."""
    return FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)


def pipeline(
    denoiser: WanTransformer3DModel | None,
    encoder: UMT5EncoderModel,
    codec: AutoencoderKLWan | None,
) -> WanPipeline:
    """Return a `WanPipeline` of the given parts with the miniature's tokenizer and scheduler."""
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder,
        vae=codec,
        scheduler=scheduler(),
        transformer=denoiser,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
