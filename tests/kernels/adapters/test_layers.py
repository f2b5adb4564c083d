"""The kernels stand in for the experts of real models: same outputs, and gone without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.kernels.adapters.models import BOUNDS, MODELS, Model, noise, off
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import PreTrainedModel

from ditune.db.errors import UsageFault
from ditune.db.kill_switch import DISABLE_VARIABLE
from ditune.db.moe import CpuTiles, MoeShape, MoeTuning
from ditune.kernels import dispatch
from ditune.kernels.adapters import modules
from ditune.kernels.adapters.layers import (
    FoundLayer,
    attach,
    detach,
    find_layers,
    is_attached,
)
from ditune.kernels.reference import Experts


class Calls:
    """What reached the kernels: the tuning of each call."""

    def __init__(self, patch: pytest.MonkeyPatch, factor: float = 1.0) -> None:
        self.tunings: list[MoeTuning | None] = []
        original = dispatch.moe

        def moe(*given: Any) -> Tensor:
            self.tunings.append(given[-1])
            return original(*given) * factor

        patch.setattr(dispatch, "moe", moe)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def eager(model: nn.Module) -> nn.Module:
    """Let a model of transformers loop over its experts, as its source reads."""
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def outputs(tiny: Model, model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Return the output of a model and of each of its layers of experts."""
    seen: list[Tensor] = []
    hooks = [
        layer.module.register_forward_hook(lambda _, __, output: seen.append(output))
        for layer in find_layers(model)
    ]
    whole = tiny.call(model)
    for hook in hooks:
        hook.remove()
    return whole, seen


@contextmanager
def attached(model: nn.Module, tuning: MoeTuning | None = None) -> Iterator[list[FoundLayer]]:
    layers = find_layers(model)
    for layer in layers:
        attach(layer, tuning)
    yield layers
    for layer in layers:
        detach(layer)


def same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> bool:
    pairs = zip((one[0], *one[1]), (other[0], *other[1]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def worst(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> float:
    pairs = zip((one[0], *one[1]), (other[0], *other[1]), strict=True)
    return max(off(a, b) for a, b in pairs)


def anatomy(model: nn.Module) -> list[tuple[object, ...]]:
    """Return what a removal must leave as it was: who is who, and how weights lie in memory."""
    modules = [(name, id(m), sorted(m.__dict__)) for name, m in model.named_modules()]
    configs = [(name, id(getattr(m, "config", None))) for name, m in model.named_modules()]
    weights = [(name, id(w), w.stride(), w.requires_grad) for name, w in model.named_parameters()]
    memory = [len({w.untyped_storage().data_ptr() for w in model.parameters()})]
    return [*modules, *configs, *weights, *((size,) for size in memory)]


def test_layers_are_found_with_their_shapes(tiny: Model) -> None:
    found = find_layers(tiny.build())
    assert len(found) == tiny.layers
    shape = MoeShape(
        experts=tiny.experts, hidden=32, inner=tiny.inner, top_k=tiny.top_k, dtype="float32"
    )
    assert {(layer.kind, layer.shape) for layer in found} == {(tiny.kind, shape)}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_outputs_are_the_models_own_to_rounding(
    tiny: Model, dtype: torch.dtype, calls: Calls
) -> None:
    model = eager(tiny.build()).to(dtype)
    wanted = outputs(tiny, model)
    with attached(model) as layers:
        calls.tunings.clear()
        found = outputs(tiny, model)
        assert len(calls.tunings) == len(layers)
    assert worst(found, wanted) <= BOUNDS[dtype]


def test_removal_leaves_no_trace(tiny: Model) -> None:
    model = tiny.build()
    before, wanted = anatomy(model), outputs(tiny, model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with attached(model) as layers:
        assert all(is_attached(layer.module) for layer in layers)
        assert all(torch.equal(value, values[n]) for n, value in model.state_dict().items())
    assert anatomy(model) == before
    assert same(outputs(tiny, model), wanted)


def test_each_layer_runs_its_tuning(tiny: Model, calls: Calls) -> None:
    model = tiny.build()
    shape = find_layers(model)[0].shape
    tuning = MoeTuning(shape=shape, default=CpuTiles(rows=16))
    with attached(model, tuning):
        outputs(tiny, model)
    assert set(calls.tunings) == {tuning}


def test_a_layer_that_differs_is_not_attached(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Calls(monkeypatch, factor=1.001)
    model = tiny.build()
    before = anatomy(model)
    with pytest.raises(UsageFault, match=r"off by 1\.0e-03 of a row's norm, and at most"):
        attach(find_layers(model)[0], None)
    assert anatomy(model) == before


def test_a_trial_that_stops_leaves_the_layer(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory for it")

    monkeypatch.setattr(dispatch, "moe", stop)
    model = tiny.build()
    before = anatomy(model)
    with pytest.raises(UsageFault, match="its trial stopped: no memory for it"):
        attach(find_layers(model)[0], None)
    assert anatomy(model) == before


def test_weights_that_change_are_the_ones_that_are_used(tiny: Model) -> None:
    model = eager(tiny.build())
    tuning = MoeTuning(shape=find_layers(model)[0].shape, default=CpuTiles(prepacked=True))

    @torch.no_grad()
    def write() -> None:
        for weight in model.parameters():
            weight.mul_(1.5)

    def replace() -> None:
        for weight in model.parameters():
            weight.data = weight.data * 1.5

    with attached(model, tuning):
        for change in (write, replace):
            change()
            found = outputs(tiny, model)
            own = eager(tiny.build())
            own.load_state_dict(model.state_dict())
            assert worst(found, outputs(tiny, own)) <= BOUNDS[torch.float32]


def test_unchanged_weights_are_the_same_tensors_at_each_call(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []  # copies that kernels make of weights live as long as the tensor does
    original = dispatch.moe

    def moe(hidden: Tensor, experts: Experts, *given: Any) -> Tensor:
        seen.append(id(experts.gate_up))
        return original(hidden, experts, *given)

    monkeypatch.setattr(dispatch, "moe", moe)
    model = tiny.build()
    with attached(model):
        for _ in range(2):
            outputs(tiny, model)
    assert len(set(seen)) == tiny.layers


def test_no_weights_are_kept_off_the_cpu() -> None:
    def twice(device: str) -> list[Experts]:
        state = modules.State(None)
        weights = torch.ones(2, 4, 2, device=device), torch.ones(2, 2, 2, device=device)
        return [state.experts(weights, lambda: Experts(*weights)) for _ in range(2)]

    assert len(set(map(id, twice("cpu")))) == 1
    assert len(set(map(id, twice("meta")))) == 2


def test_inference_mode_is_served(tiny: Model, calls: Calls) -> None:
    model = tiny.build()
    wanted = outputs(tiny, model)
    with torch.inference_mode(), attached(model):
        calls.tunings.clear()
        found = outputs(tiny, model)
    assert len(calls.tunings) == tiny.layers
    assert worst(found, wanted) <= BOUNDS[torch.float32]
    assert not any(weight.is_inference() for weight in model.parameters())


def test_a_model_may_change_its_dtype_while_it_is_attached(tiny: Model, calls: Calls) -> None:
    model = eager(tiny.build())
    with attached(model):
        model.to(torch.bfloat16)
        calls.tunings.clear()
        found = outputs(tiny, model)
        assert len(calls.tunings) == tiny.layers
    assert worst(found, outputs(tiny, model)) <= BOUNDS[torch.bfloat16]


def test_copies_run_on_weights_of_their_own(tiny: Model) -> None:
    model = eager(tiny.build())
    wanted = outputs(tiny, model)
    with attached(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        assert worst(outputs(tiny, other), wanted) <= BOUNDS[torch.float32]


def test_gradients_take_the_models_own_code(calls: Calls) -> None:
    tiny = MODELS["mixtral"]
    model = tiny.build()
    with attached(model) as layers:
        calls.tunings.clear()
        tiny.call(model).sum().backward()
        assert calls.tunings == []
    assert all(layer.module.gate_up_proj.grad is not None for layer in layers)


def test_the_kill_switch_takes_the_models_own_code(
    tiny: Model, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.build()
    wanted = outputs(tiny, model)
    with attached(model):
        calls.tunings.clear()
        monkeypatch.setenv(DISABLE_VARIABLE, "1")
        assert same(outputs(tiny, model), wanted)
        assert calls.tunings == []
        monkeypatch.setenv(DISABLE_VARIABLE, "0")
        outputs(tiny, model)
        assert len(calls.tunings) == tiny.layers


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # HiDream's norms
def test_autocast_takes_the_models_own_code(tiny: Model, calls: Calls) -> None:
    model = tiny.build()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs(tiny, model)
        with attached(model):
            calls.tunings.clear()
            assert same(outputs(tiny, model), wanted)
    assert calls.tunings == []


@pytest.mark.parametrize("name", ["mixtral", "nucleus"])
def test_a_layer_is_one_node_of_a_compiled_graph(name: str) -> None:
    model = MODELS[name].build()
    seen: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph.code)
        compiled: Any = aot_eager
        return compiled(graph, inputs)

    with attached(model) as layers, torch.no_grad():
        block: Any = model.get_submodule(layers[0].name.removesuffix(".experts"))
        given = (noise(2, 8, 32),) if name == "mixtral" else (noise(2, 8, 32), noise(2, 8, 64))
        wanted = block(*given)
        compiled: Any = torch.compile(block, backend=backend, fullgraph=True)
        found = compiled(*given)
    assert off(found, wanted) <= BOUNDS[torch.float32]
    assert [code.count("torch.ops.ditune.moe") for code in seen] == [1]


def test_a_compiled_hidream_runs_the_kernels_between_its_graphs(calls: Calls) -> None:
    tiny = MODELS["hidream"]
    model = tiny.build()
    wanted = outputs(tiny, model)[0]
    with attached(model), torch.no_grad():
        calls.tunings.clear()
        compiled: Any = torch.compile(model, backend="eager")
        found = tiny.call(compiled)
    assert len(calls.tunings) == tiny.layers
    assert off(found, wanted) <= BOUNDS[torch.float32]


def test_slots_of_other_devices_add_nothing(calls: Calls) -> None:
    model = eager(MODELS["mixtral"].build())
    module: Any = find_layers(model)[0].module
    module._is_expert_parallel = True
    indices = torch.tensor([[4, 1], [4, 4], [0, 2]])  # 4 is no expert of this device
    weights = torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.25, 0.75]])
    with torch.no_grad():
        wanted = module(torch.ones(3, 32), indices, weights)
        with attached(model):
            calls.tunings.clear()
            found = module(torch.ones(3, 32), indices, weights)
    assert len(calls.tunings) == 1
    assert off(found, wanted) <= BOUNDS[torch.float32]
    assert torch.equal(found[1], torch.zeros(32))


def test_an_adapter_on_an_expert_later_takes_the_models_own_code(calls: Calls) -> None:
    tiny = MODELS["hidream"]
    model = tiny.build()
    with attached(model) as layers:
        experts: list[Any] = [layer.module.get_submodule("experts.0") for layer in layers]
        for expert in experts:
            expert.w1 = nn.Sequential(expert.w1, nn.Identity())
        calls.tunings.clear()
        tiny.call(model)
        assert calls.tunings == []
        for expert in experts:
            expert.w1 = expert.w1[0]
        tiny.call(model)
        assert len(calls.tunings) == len(layers)


def test_packing_keeps_no_second_copy() -> None:
    model = MODELS["hidream"].build()
    with attached(model) as layers:
        weights = list(layers[0].module.get_submodule("experts").parameters())
        assert len({w.untyped_storage().data_ptr() for w in weights}) == 2
        assert sum(w.nbytes for w in weights) == sum(
            {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}.values()
        )
