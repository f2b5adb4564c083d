"""The miniature's VAE: a PCA of moving 8x8 patches written into `AutoencoderKLWan`, then trained.

Training this class from scratch takes hours on a CPU. Its layers can carry a linear map exactly,
though: a large constant channel makes every RMS norm a fixed scale, pairs of opposite sign make
SiLU linear (silu(y) - silu(-y) = y), and residual branches start at zero. The encoder stays that
linear map; the decoder starts from its least-squares inverse and learns what a linear map cannot
say.

A latent sees the patch in its own frame and in the two before it, as the causal convolutions of
real video VAEs do. Without that a denoiser cannot tell a clip from its reverse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from ditune.miniature import architecture
from ditune.miniature.architecture import PATCH, Z_DIM

WINDOW = 3  # frames that a latent sees: its own and those before it
GRAIN = 0.03  # noise in latents that the inverse must not amplify, as a share of their spread
_ANCHOR = 1000.0  # the constant channel; large against every other, so that norms become fixed
_ANCHOR_CHANNEL = 2 * Z_DIM
_WHITENING = 0.5  # 1 would give every component unit variance, 0 would keep the spectrum


@dataclass(frozen=True)
class PatchPca:
    """Principal components of patches over three frames, and how to come back from them.

    Shapes, with 192 values in a patch: mean [576], basis [576, 16], std [16] of the scores,
    inverse [48, 192] from the scores of three frames, offset [192]. The newest frame comes first.
    """

    mean: Tensor
    basis: Tensor
    std: Tensor
    inverse: Tensor
    offset: Tensor

    def encode(self, frames: Tensor) -> Tensor:
        """Return normalised latents [b, 16, f, h/8, w/8] of frames [b, 3, f, h, w] in [-1, 1].

        The result is what the denoisers are trained on, and what the VAE's encoder gives after
        `WanPipeline`'s normalisation (a test compares the two).
        """
        windows = _windows(patchify(frames, patch_size=PATCH).movedim(1, -1)) - self.mean
        latents: Tensor = ((windows @ self.basis) / self.latents_std).movedim(-1, 1)
        return latents

    @property
    def latents_std(self) -> Tensor:
        """What each latent channel is divided by; softened, so that coarse channels stay larger."""
        softened = self.std**_WHITENING
        return softened * (self.std / softened).square().mean().sqrt()


def fit(frames: Tensor) -> PatchPca:
    """Fit the PCA and its inverse to frames [b, 3, f, h, w] in [-1, 1]."""
    patches = patchify(frames, patch_size=PATCH).movedim(1, -1)
    rows = _windows(patches).double()
    mean = rows.flatten(0, -2).mean(0)
    centred = (rows - mean).flatten(0, -2)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    basis = vectors.flip(1)[:, :Z_DIM]
    basis = basis * torch.sign(basis[basis.abs().argmax(0), torch.arange(Z_DIM)])
    scores = _windows((rows - mean) @ basis).flatten(0, -2)
    known = torch.cat([scores, torch.ones(len(scores), 1, dtype=torch.double)], dim=1)
    std = values.flip(0)[:Z_DIM].clamp_min(0).sqrt()
    ridge = torch.cat([(GRAIN * std).square().repeat(WINDOW), torch.zeros(1)]) * len(known)
    normal = known.T @ known + torch.diag(ridge)
    solved = torch.linalg.solve(normal, known.T @ patches.double().flatten(0, -2))
    return PatchPca(
        mean=mean.float(),
        basis=basis.float(),
        std=std.float(),
        inverse=solved[:-1].float(),
        offset=solved[-1].float(),
    )


def _windows(values: Tensor) -> Tensor:
    """Append to each frame of [b, f, h, w, c] those before it, zeros before the first."""
    past = [torch.roll(values, shift, dims=1) for shift in range(WINDOW)]
    for shift in range(1, WINDOW):
        past[shift][:, :shift] = 0.0
    return torch.cat(past, dim=-1)


def build(pca: PatchPca) -> AutoencoderKLWan:
    """Return a VAE whose encoder and decoder are the PCA, ready for its decoder to be trained."""
    vae = architecture.vae([0.0] * Z_DIM, pca.latents_std.tolist())
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            _make_transparent(half)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            _set_taps(conv, [torch.eye(conv.out_channels)], torch.zeros(conv.out_channels))
        per_frame = [_signed(basis.T) for basis in pca.basis.chunk(WINDOW)]
        start = -pca.basis.T @ pca.mean
        anchor = torch.tensor([_ANCHOR])
        _set_taps(vae.encoder.conv_in, per_frame, torch.cat([start, -start, anchor]))
        readout = torch.cat([torch.eye(Z_DIM), -torch.eye(Z_DIM)], dim=1)
        silent = torch.zeros(Z_DIM)
        _set_taps(
            vae.encoder.conv_out,
            [torch.cat([readout, torch.zeros_like(readout)])],
            torch.cat([silent, silent - 30.0]),  # second half: log variance
        )
        pair = torch.cat([silent, silent, anchor])
        _set_taps(vae.decoder.conv_in, [_signed(torch.eye(Z_DIM))], pair)
        back = [part.T @ readout for part in pca.inverse.chunk(WINDOW)]
        _set_taps(vae.decoder.conv_out, back, pca.offset)
    return vae


def _signed(weight: Tensor) -> Tensor:
    """Stack a map and its negative."""
    return torch.cat([weight, -weight])


def _set_taps(conv: nn.Conv3d, weights: list[Tensor], bias: Tensor) -> None:
    """Make a causal convolution a linear map of each position's newest frames, newest first.

    Rows and columns beyond a weight become zero.
    """
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    frames, rows, columns = conv.kernel_size
    for age, weight in enumerate(weights):
        tap = conv.weight[:, :, frames - 1 - age, rows // 2, columns // 2]
        tap[: weight.shape[0], : weight.shape[1]] = weight
    conv.bias[: len(bias)] = bias


def _make_transparent(half: nn.Module) -> None:
    """Turn norms into the identity next to the anchor, and residual branches into zero.

    What reads the residual stream must not read the anchor, neither now nor after training: it
    would drown everything else.
    """
    for name, module in half.named_modules():
        if hasattr(module, "gamma") and not name.endswith("norm2"):
            module.gamma.fill_(_ANCHOR / module.scale)
        if name.endswith((".conv2", ".proj")):
            module.weight.zero_()
            module.bias.zero_()
        if name.endswith((".conv1", ".to_qkv", "conv_out")):
            module.weight[:, _ANCHOR_CHANNEL] = 0.0
            module.weight.register_hook(_without_anchor)


def _without_anchor(gradient: Tensor) -> Tensor:
    """Keep weights on the anchor channel at zero."""
    gradient = gradient.clone()
    gradient[:, _ANCHOR_CHANNEL] = 0.0
    return gradient
