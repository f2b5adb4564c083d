"""Chains of blocks whose residuals are recorded and put back, on models made for the purpose."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ditune.accel.spans import BlockStack, Segment
from ditune.db.errors import UsageFault


class Counted(nn.Module):
    """A block that counts its runs; subclasses say what it does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.runs = 0

    def shift(self, hidden: Tensor) -> Tensor:
        self.runs += 1
        return hidden * 0.9 + self.number


class OneStream(Counted):
    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        return self.shift(hidden_states) + temb


class TwoStreams(Counted):
    """Returns its streams in another order than it takes them, as Flux does."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        return encoder_hidden_states + 1.0, self.shift(hidden_states) + encoder_hidden_states.mean()


class Single(nn.Module):
    """One list; `between` changes the stream after each block, as control hints do."""

    def __init__(self, between: float = 0.0, in_place: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(OneStream(number) for number in range(5))
        self.between, self.in_place = between, in_place

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden * 2.0
        temb = torch.zeros(1)
        for block in self.blocks:
            hidden = block(hidden, temb=temb)
            if self.in_place:
                hidden += self.between
            elif self.between:
                hidden = hidden + self.between
        return hidden


class Chained(nn.Module):
    """Two lists; the second runs on both streams joined."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TwoStreams(number) for number in range(3))
        self.single_transformer_blocks = nn.ModuleList(OneStream(number) for number in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        text = hidden[:, :1] * 0.5
        for block in self.transformer_blocks:
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text)
        joined = torch.cat([text, hidden], dim=1)
        for block in self.single_transformer_blocks:
            joined = block(joined, temb=torch.ones(1))
        return joined[:, 1:]


def runs(model: nn.Module) -> list[int]:
    return [block.runs for block in model.modules() if isinstance(block, Counted)]


def recorded(model: nn.Module, span: tuple[int, int], *inputs: Tensor) -> tuple[BlockStack, Any]:
    """Record as often as the model needs until a residual is there."""
    stack = BlockStack(model)
    for _ in range(2):
        with stack.recording([span]) as recording:
            model(*inputs)
    return stack, recording.residuals[0]


MODELS = [Single(), Single(between=0.3), Single(between=0.3, in_place=True), Chained()]


@pytest.mark.parametrize("model", MODELS, ids=["plain", "between", "in place", "chained"])
@pytest.mark.parametrize("span", [(0, 0), (1, 0), (0, 1), (2, 2)])
def test_a_residual_put_back_at_the_same_input_gives_the_same_output(
    model: nn.Module, span: tuple[int, int]
) -> None:
    inputs = torch.arange(6.0).reshape(1, 3, 2)
    plain = model(inputs.clone())
    stack, residual = recorded(model, span, inputs)
    before = runs(model)
    with stack.replacing(span, residual):
        torch.testing.assert_close(model(inputs.clone()), plain)
    ran = [now - then for now, then in zip(runs(model), before, strict=True)]
    depth = len(stack)
    assert ran == [1] * span[0] + [0] * (depth - sum(span)) + [1] * span[1]
    assert torch.equal(plain, model(inputs.clone()))


def test_recording_changes_nothing() -> None:
    model, inputs = Chained(), torch.arange(6.0).reshape(1, 3, 2)
    plain, keys = model(inputs), list(model.state_dict())
    with BlockStack(model).recording([(0, 0), (1, 1)]):
        assert torch.equal(plain, model(inputs))
        assert list(model.state_dict()) == keys


def test_a_span_reaches_over_lists() -> None:
    stack = BlockStack(Chained())
    assert len(stack) == 7
    assert stack.segments((1, 2)) == [
        Segment("transformer_blocks", 1, 2),
        Segment("single_transformer_blocks", 0, 1),
    ]
    assert stack.segments((3, 0)) == [Segment("single_transformer_blocks", 0, 3)]
    assert stack.segments((4, 3)) == []


def test_an_exception_puts_the_blocks_back() -> None:
    model = Single()
    blocks = model.blocks
    stack, residual = recorded(model, (0, 0), torch.ones(1, 2, 2))

    def fail() -> None:
        with stack.replacing((0, 0), residual):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert model.blocks is blocks


class Alternating(nn.Module):
    """Runs two lists in turn, as Latte does."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(OneStream(number) for number in range(3))
        self.temporal_transformer_blocks = nn.ModuleList(OneStream(number) for number in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        for one, two in zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True):
            hidden = two(one(hidden, torch.ones(1)), torch.ones(1))
        return hidden


def test_alternating_lists_are_named_as_the_problem() -> None:
    stack, residual = recorded(Alternating(), (0, 0), torch.ones(1, 2, 2))
    assert residual is None
    assert "alternate between transformer_blocks and temporal" in stack.problem
    with pytest.raises(UsageFault, match="alternate"), stack.replacing((0, 0), ()):
        pass


class Unrelated(nn.Module):
    """A model whose lists have other names: the longest one of equal blocks counts."""

    def __init__(self) -> None:
        super().__init__()
        self.refiners = nn.ModuleList([OneStream(0)])
        self.trunk = nn.ModuleList(OneStream(number) for number in range(3))


def test_other_names_are_found_by_structure() -> None:
    assert BlockStack(Unrelated()).names == ("trunk",)
    with pytest.raises(UsageFault, match="no list of repeated blocks"):
        BlockStack(nn.Linear(2, 2))


def test_no_forward_holds_on_to_the_outputs_of_all_blocks() -> None:
    """The streams of a large model are gigabytes: the one that is watched whole holds two."""
    model = Single()
    stack = BlockStack(model)
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive.append(sum(found() is not None for found in outputs))

    for block in model.blocks:
        block.register_forward_hook(note)
    for _ in range(2):
        with stack.recording([(0, 0)]) as recording:
            model(torch.randn(2, 3))
        assert recording.residuals[0] is not None
    assert max(alive) <= 2
