"""The training recipe of the miniature's text encoder, judge and video codec.

Each function trains one part from a seed and returns it. The denoisers' recipe stands in `flow.py`;
`train.py` runs them all in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn import functional
from transformers import UMT5EncoderModel

from ditune.miniature import architecture, codec
from ditune.miniature.architecture import PATCH, TEXT_TOKENS
from ditune.miniature.classifier import Judge
from ditune.miniature.clips import Clips, render
from ditune.miniature.language import COLOUR_NAMES, DIGITS, MOTIONS, subjects

Log = Callable[[int, float], None]  # step, loss


def linear_decay(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    """Set the learning rate: 20 steps of warm-up, then a straight line down to zero."""
    rate = peak * min((step + 1) / 20, (steps - step) / steps)
    for group in optimizer.param_groups:
        group["lr"] = rate


def train_text_encoder(seed: int, steps: int) -> UMT5EncoderModel:
    """Train the text encoder to spell out its caption: digit, colour and motion are read off it."""
    torch.manual_seed(seed)
    encoder = architecture.text_encoder()
    heads = nn.Linear(architecture.TEXT_DIM, len(DIGITS) + len(COLOUR_NAMES) + len(MOTIONS))
    captions = [subject.caption for subject in subjects()]
    tokens = architecture.tokenizer()(captions, padding=True, return_tensors="pt")
    weight = tokens.attention_mask[..., None] / tokens.attention_mask.sum(1)[:, None, None]
    wanted = torch.tensor([[s.digit, s.colour, s.motion] for s in subjects()])
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], weight_decay=0.01)
    for step in range(steps):
        linear_decay(optimizer, step, steps, 2e-3)
        states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        logits = heads((states * weight).sum(1)).split(
            [len(DIGITS), len(COLOUR_NAMES), len(MOTIONS)], dim=1
        )
        loss = _cross_entropy(logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval().requires_grad_(False)


def text_table(encoder: UMT5EncoderModel) -> Tensor:
    """Return the prompt embeddings [481, 8, 64] of every subject, and of the empty prompt last."""
    pipe: WanPipeline = architecture.pipeline(None, encoder, None)
    prompts = [subject.caption for subject in subjects()] + [""]
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
        )
    table: Tensor = embeddings.float()
    return table


def train_judge(seed: int, steps: int, log: Log) -> Judge:
    """Train the judge on rendered clips, blurred and noisy at random."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Judge().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    for step in range(steps):
        linear_decay(optimizer, step, steps, 2e-3)
        clips = render(64, generator)
        wanted = torch.stack([clips.digit, clips.colour, clips.motion], dim=1)
        loss = _cross_entropy(model(_weathered(clips, generator)), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log(step, float(loss.detach()))
    return model.eval()


def _weathered(clips: Clips, generator: torch.Generator) -> Tensor:
    """Blur half of the clips slightly and add noise, so that the judge reads shapes, not pixels."""
    frames = clips.frames
    blurred = functional.avg_pool3d(frames, (1, 3, 3), stride=1, padding=(0, 1, 1))
    mix = torch.rand(len(frames), 1, 1, 1, 1, generator=generator) * 0.8
    mix = mix * (torch.rand(mix.shape, generator=generator) < 0.5)
    noise = torch.randn(frames.shape, generator=generator)
    strength = torch.rand(mix.shape, generator=generator) * 0.12
    return torch.lerp(frames, blurred, mix) + noise * strength


def _cross_entropy(logits: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
    """Return the summed cross-entropy of the attributes; `wanted` is [batch, attributes]."""
    losses = [functional.cross_entropy(head, wanted[:, i]) for i, head in enumerate(logits)]
    return torch.stack(losses).sum()


def fit_pca(seed: int, clips: int) -> codec.PatchPca:
    """Fit the patch PCA of the codec to rendered training clips."""
    return codec.fit(render(clips, torch.Generator().manual_seed(seed)).frames)


def train_decoder(
    vae: AutoencoderKLWan, pca: codec.PatchPca, seed: int, steps: int, log: Log
) -> None:
    """Train the decoder in place to undo the PCA better than its inverse.

    The encoder stays as it is. All frames of a clip are decoded at once, which equals the chunked
    loop of `AutoencoderKLWan.decode` because every convolution is causal.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.99))
    scale = pca.latents_std.view(1, -1, 1, 1, 1)
    for step in range(steps):
        linear_decay(optimizer, step, steps, 3e-4)
        frames = render(16, generator).frames
        latents = pca.encode(frames)
        grain = torch.rand(len(frames), 1, 1, 1, 1, generator=generator) * 0.05
        latents = latents + grain * torch.randn(latents.shape, generator=generator)
        decoded = vae.decoder(vae.post_quant_conv(latents * scale))
        loss = functional.mse_loss(unpatchify(decoded, patch_size=PATCH), frames)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        log(step, float(loss.detach()))
