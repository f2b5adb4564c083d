from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ditune.miniature import architecture, codec
from ditune.miniature.clips import render
from ditune.miniature.flow import FlowTrainer, Schedule, grow
from ditune.miniature.recipe import text_table, train_text_encoder


@pytest.fixture(scope="module")
def parts() -> tuple[codec.PatchPca, torch.Tensor]:
    torch.manual_seed(0)
    pca = codec.fit(render(60, torch.Generator().manual_seed(0)).frames)
    return pca, text_table(architecture.text_encoder().eval())


def trainer(parts: tuple[codec.PatchPca, torch.Tensor], steps: int) -> FlowTrainer:
    torch.manual_seed(1)
    model = architecture.transformer("small", 2)
    return FlowTrainer(model, *parts, Schedule(steps=steps, batch=4, warmup_steps=1))


def test_a_resumed_run_equals_an_uninterrupted_one(
    parts: tuple[codec.PatchPca, torch.Tensor], tmp_path: Path
) -> None:
    whole = trainer(parts, 4)
    losses = [whole.advance() for _ in range(4)]
    first = trainer(parts, 4)
    again = [first.advance() for _ in range(2)]
    first.save(tmp_path / "state.pt")
    second = trainer(parts, 4)
    second.resume(tmp_path / "state.pt")
    again += [second.advance() for _ in range(2)]
    assert losses == again
    for a, b in zip(whole.ema.parameters(), second.ema.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_grown_model_computes_the_same() -> None:
    torch.manual_seed(0)
    shallow = architecture.transformer("small", 2).eval()
    deep = grow(shallow, "small", 6).eval()
    inputs = (torch.randn(1, 16, 13, 4, 4), torch.tensor([500]), torch.randn(1, 8, 64))
    with torch.no_grad():
        expected, found = shallow(*inputs)[0], deep(*inputs)[0]
    assert len(deep.blocks) == 6
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="not a multiple"):
        grow(shallow, "small", 5)


def test_rates_fall_in_a_line() -> None:
    schedule = Schedule(steps=100, batch=1, start=1.0, end=0.5, warmup_steps=10)
    assert [round(schedule.rate(s), 3) for s in (0, 50)] == [0.1, 0.75]


def test_the_text_encoder_learns_to_spell_its_caption() -> None:
    table = text_table(train_text_encoder(seed=0, steps=3))
    assert table.shape == (481, 8, 64)
    assert not torch.equal(table[0], table[1])
    assert torch.count_nonzero(table[-1, 1:]) == 0  # the empty prompt is one token, then padding


def test_a_schedule_says_which_noise_levels_are_seen(
    parts: tuple[codec.PatchPca, torch.Tensor],
) -> None:
    model = architecture.transformer("small", 1)

    def first(below: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        schedule = Schedule(steps=1, batch=64, below=below)
        batch = FlowTrainer(model, *parts, schedule)._next_batch()
        return batch.clean, batch.sigma

    clean, sigma = first()
    assert float(sigma.max()) > 0.8
    again, quieter = first(below=0.5)
    assert torch.equal(again, clean)
    assert torch.equal(quieter[1::2], sigma[1::2])
    torch.testing.assert_close(quieter[::2], sigma[::2] * 0.5)
