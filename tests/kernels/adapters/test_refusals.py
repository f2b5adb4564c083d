"""Layers that the kernels do not compute stay as they are, with a sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.kernels.adapters.models import MODELS, Model, gpt_oss
from torch import nn

from ditune.db.errors import UsageFault
from ditune.kernels.adapters.layers import RefusedLayer, attach, find_layers, survey


def refusals(model: nn.Module) -> set[str]:
    return {layer.reason for layer in survey(model) if isinstance(layer, RefusedLayer)}


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("has_gate", False, "have no gate"),
        ("has_bias", True, "have biases"),
        ("is_transposed", True, "stored transposed"),
        ("is_concatenated", False, "interleaved"),
        ("has_post_expert_norm", True, "end in a norm"),
        ("act_fn", nn.GELU(), "activation is GELU"),
    ],
)
def test_experts_that_compute_something_else_are_refused(
    flag: str, value: object, sentence: str
) -> None:
    model: Any = MODELS["mixtral"].build()
    setattr(model.model.layers[0].mlp.experts, flag, value)
    (reason,) = refusals(model)
    assert sentence in reason
    assert len(find_layers(model)) == 1


def test_a_gate_of_the_models_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = MODELS["mixtral"].build()
    own = type(model.model.layers[0].mlp.experts)
    monkeypatch.setattr(own, "_apply_gate", lambda _, both: both.chunk(2, dim=-1)[0])
    assert refusals(model) == {"its gate is not the plain act(gate) * up"}


def test_gpt_oss_is_refused_whole() -> None:
    model = gpt_oss()
    assert find_layers(model) == []
    assert len(survey(model)) == 2


def test_a_config_without_the_number_of_experts_per_token_is_refused() -> None:
    model: Any = MODELS["mixtral"].build()
    for layer in model.model.layers:
        layer.mlp.experts.config = SimpleNamespace(hidden_size=32)
    (reason,) = refusals(model)  # the same one twice
    assert "does not say how many experts a token has" in reason


@pytest.mark.parametrize("name", ["mixtral", "nucleus"])
def test_weights_that_are_no_plain_tensors_are_refused(name: str) -> None:
    model = MODELS[name].build()
    experts: Any = find_layers(model)[0].module
    experts.gate_up_proj = type("Sharded", (nn.Parameter,), {})(experts.gate_up_proj.data)
    assert any("no plain tensor but Sharded" in reason for reason in refusals(model))


def test_weights_that_are_not_in_memory_have_a_shape_and_are_not_attached(tiny: Model) -> None:
    layer = find_layers(tiny.build().to("meta"))[0]
    assert layer.shape.experts == tiny.experts
    with pytest.raises(UsageFault, match="not in memory"):
        attach(layer, None)


def test_float64_is_refused(tiny: Model) -> None:
    reasons = refusals(tiny.build().double())
    assert all("float64: bring it to bfloat16" in reason for reason in reasons)
    assert reasons


def test_methods_that_something_else_replaced_are_refused() -> None:
    for name, method in (("hidream", "moe_infer"), ("nucleus", "forward")):
        model = MODELS[name].build()
        module = find_layers(model)[0].module
        setattr(module, method, getattr(module, method))
        assert any("was replaced already" in reason for reason in refusals(model))
