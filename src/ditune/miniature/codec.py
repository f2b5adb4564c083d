"""The miniature's VAE: an 8x8-patch PCA written into `AutoencoderKLWan`, its decoder then trained.

Training this class from scratch takes hours on a CPU. Its layers can carry a linear map exactly,
though: a large constant channel makes every RMS norm a fixed scale, pairs of opposite sign make
SiLU linear (silu(y) - silu(-y) = y), and residual branches start at zero. The encoder stays that
linear map; the decoder starts from its inverse and learns what PCA cannot say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify
from torch import Tensor, nn

from ditune.miniature import architecture
from ditune.miniature.architecture import PATCH, Z_DIM

_ANCHOR = 1000.0  # the constant channel; large against every other, so that norms become fixed
_ANCHOR_CHANNEL = 2 * Z_DIM
_WHITENING = 0.5  # 1 would give every component unit variance, 0 would keep the spectrum


@dataclass(frozen=True)
class PatchPca:
    """Principal components of 8x8 patches: mean [192], basis [192, 16], std [16] of each score."""

    mean: Tensor
    basis: Tensor
    std: Tensor

    def encode(self, frames: Tensor) -> Tensor:
        """Return normalised latents [b, 16, f, h/8, w/8] of frames [b, 3, f, h, w] in [-1, 1].

        The result is what the denoisers are trained on, and what the VAE's encoder gives after
        `WanPipeline`'s normalisation (a test compares the two).
        """
        patches = patchify(frames, patch_size=PATCH).movedim(1, -1) - self.mean
        latents: Tensor = ((patches @ self.basis) / self.latents_std).movedim(-1, 1)
        return latents

    @property
    def latents_std(self) -> Tensor:
        """What each latent channel is divided by; softened, so that coarse channels stay larger."""
        softened = self.std**_WHITENING
        return softened * (self.std / softened).square().mean().sqrt()


def fit(frames: Tensor) -> PatchPca:
    """Fit the patch PCA to frames [b, 3, f, h, w] in [-1, 1]."""
    rows = patchify(frames, patch_size=PATCH).movedim(1, -1).flatten(0, -2).double()
    mean = rows.mean(0)
    centred = rows - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    basis = vectors.flip(1)[:, :Z_DIM]
    sign = torch.sign(basis[basis.abs().argmax(0), torch.arange(Z_DIM)])  # eigh's signs are free
    std = values.flip(0)[:Z_DIM].clamp_min(0).sqrt()
    return PatchPca(mean.float(), (basis * sign).float(), std.float())


def build(pca: PatchPca) -> AutoencoderKLWan:
    """Return a VAE whose encoder and decoder are the PCA, ready for its decoder to be trained."""
    vae = architecture.vae([0.0] * Z_DIM, pca.latents_std.tolist())
    with torch.no_grad():
        for half in (vae.encoder, vae.decoder):
            _make_transparent(half)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            _set_centre(conv, torch.eye(conv.out_channels), torch.zeros(conv.out_channels))
        scores = pca.basis.T
        _set_centre(vae.encoder.conv_in, *_antisymmetric(scores, -scores @ pca.mean))
        readout = torch.cat([torch.eye(Z_DIM), -torch.eye(Z_DIM)], dim=1)
        silent = torch.zeros(Z_DIM)
        _set_centre(
            vae.encoder.conv_out,
            torch.cat([readout, torch.zeros_like(readout)]),
            torch.cat([silent, silent - 30.0]),  # second half: log variance
        )
        _set_centre(vae.decoder.conv_in, *_antisymmetric(torch.eye(Z_DIM), silent))
        _set_centre(vae.decoder.conv_out, pca.basis @ readout, pca.mean)
    return vae


def _antisymmetric(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Stack a map, its negative, and the constant anchor channel."""
    anchor = torch.zeros(1, weight.shape[1])
    return torch.cat([weight, -weight, anchor]), torch.cat([bias, -bias, torch.tensor([_ANCHOR])])


def _set_centre(conv: nn.Conv3d, weight: Tensor, bias: Tensor) -> None:
    """Make a causal convolution a per-position linear map; rows beyond `weight` become zero."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    frames, rows, columns = conv.kernel_size
    tap = conv.weight[:, :, frames - 1, rows // 2, columns // 2]  # causal: the last frame is "now"
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
