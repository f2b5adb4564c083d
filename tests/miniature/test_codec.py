from __future__ import annotations

import torch

from ditune.miniature import codec
from ditune.miniature.clips import render
from ditune.miniature.recipe import train_decoder


def test_the_untrained_codec_is_the_pca_and_training_improves_it() -> None:
    pca = codec.fit(render(300, torch.Generator().manual_seed(0)).frames)
    vae = codec.build(pca)
    frames = render(4, torch.Generator().manual_seed(1), held_out=True).frames
    with torch.no_grad():
        latents = vae.encode(frames).latent_dist.mode()
        scaled = latents / pca.latents_std.view(1, -1, 1, 1, 1)
        torch.testing.assert_close(scaled, pca.encode(frames), atol=0.02, rtol=0.0)
        decoded = vae.decode(latents).sample
    error = float((decoded - frames).square().mean())
    assert error < 0.03  # 21 dB
    losses: list[float] = []
    train_decoder(vae, pca, seed=0, steps=6, log=lambda _, loss: losses.append(loss))
    assert len(losses) == 6
    assert max(losses) < 0.05  # the anchor channel does not drown the signal


def test_encoder_is_left_alone_by_training() -> None:
    pca = codec.fit(render(60, torch.Generator().manual_seed(0)).frames)
    vae = codec.build(pca)
    before = {k: v.clone() for k, v in vae.encoder.state_dict().items()}
    train_decoder(vae, pca, seed=0, steps=2, log=lambda *_: None)
    assert all(torch.equal(v, vae.encoder.state_dict()[k]) for k, v in before.items())
