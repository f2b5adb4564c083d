"""Where two models' weights are during a hand-off, counted tensor by tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from tests.conftest import STEPS, Generate, two_experts, wan_transformer
from torch import Tensor, nn

from ditune.accel.apply import Applied, accelerate
from ditune.accel.residence import Offload, Residence, Weights, peak_weight_bytes, weight_bytes
from ditune.db.errors import UsageFault
from ditune.db.policy import Action, Handoff, MaskCache, Policy

CPU = torch.device("cpu")


def handoff(pipe: WanPipeline, until: int | None = None) -> Policy:
    """Return a policy that hands over after half of the steps, and back at `until`."""
    pipe.scheduler.set_timesteps(STEPS)
    sigmas = pipe.scheduler.sigmas.tolist()
    back = None if until is None else (sigmas[until - 1] + sigmas[until]) / 2
    middle = STEPS // 2
    return Policy(handoff=Handoff(sigma=(sigmas[middle - 1] + sigmas[middle]) / 2, until=back))


def on_host(applied: Applied, host: set[int]) -> None:
    """Remember which tensors are the host's; all others are copies on the 'device'."""
    residence = applied._residence
    assert residence is not None
    for weights in (residence._small, residence._large):
        if weights is not None:
            host |= {tensor.data_ptr() for tensor in weights._host}


def counted(*models: nn.Module, host: set[int]) -> int:
    """Return the bytes that the tensors of some models take outside the host's copies."""
    tensors = [each for model in models for each in (*model.parameters(), *model.buffers())]
    found = {each.data_ptr(): each.untyped_storage().nbytes() for each in tensors}
    return sum(size for place, size in found.items() if place not in host)


def experts(pipe: WanPipeline) -> WanPipeline:
    """Return a pipeline whose second expert takes the later steps."""
    return two_experts(pipe, wan_transformer(seed=2), 0.5)


@pytest.fixture
def movable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let weights be moved though host and device are the same: copies count as the device."""

    def moved(self: Applied, device: torch.device) -> Residence:
        assert self._small is not None
        return Residence(self._models, self._small.model, self._offload, device)

    monkeypatch.setattr(Applied, "_moved", moved)


@pytest.mark.usefixtures("movable")
@pytest.mark.parametrize("offload", ["lazy", "swap"])
def test_weights_are_where_they_are_needed_and_nowhere_else(
    pipe: WanPipeline, generate: Generate, offload: Offload
) -> None:
    small = wan_transformer(layers=2, seed=7)
    policy = handoff(pipe, until=STEPS - 1)
    with accelerate(pipe, policy, small=small) as applied:
        wanted = generate(pipe)
        both = applied.summary().peak_weight_bytes
    large_bytes, small_bytes = weight_bytes(pipe.transformer), weight_bytes(small)
    assert both == large_bytes + small_bytes

    seen: list[tuple[str, int]] = []
    host: set[int] = set()
    with accelerate(pipe, policy, small=small, offload=offload) as applied:

        def note(name: str) -> Any:
            def hook(*_: Any) -> None:
                on_host(applied, host)
                seen.append((name, counted(pipe.transformer, small, host=host)))

            return hook

        hooks = [
            pipe.transformer.blocks[0].register_forward_pre_hook(note("large")),
            small.blocks[0].register_forward_pre_hook(note("small")),
        ]
        for _ in range(2):  # the second call starts as the first one did
            seen.clear()
            assert torch.equal(wanted, generate(pipe))
            before, after = peak_weight_bytes(large_bytes, small_bytes, offload)
            found = [size for _, size in seen]
            assert found[0] == before == large_bytes
            first = [name for name, _ in seen].index("small")
            assert found[first] == after
            assert max(found) == applied.summary().peak_weight_bytes == max(before, after)
        on_host(applied, host)
        assert counted(pipe.transformer, small, host=host) == large_bytes
    for each in hooks:
        each.remove()
    assert torch.equal(wanted, _handed(pipe, policy, small, generate))


def _handed(pipe: WanPipeline, policy: Policy, small: nn.Module, generate: Generate) -> Tensor:
    with accelerate(pipe, policy, small=small):
        return generate(pipe)


def test_a_small_model_with_a_cache_outlasts_the_switch_of_experts(
    pipe: WanPipeline, generate: Generate
) -> None:
    """The second expert itself never runs: what rebuilds outputs is the small model's."""
    two = experts(pipe)
    pipe.scheduler.set_timesteps(STEPS)
    early = [float(t) for t in pipe.scheduler.timesteps].index(
        next(float(t) for t in pipe.scheduler.timesteps if t < 500)
    )
    actions: list[Action] = ["full"] * STEPS
    actions[early] = "step"  # the first forward that the pipeline asks of the second expert
    switch = float(pipe.scheduler.sigmas[early - 2] + pipe.scheduler.sigmas[early - 3]) / 2
    policy = Policy(cache=MaskCache(actions=tuple(actions)), handoff=Handoff(sigma=switch))
    with accelerate(two, policy, small=wan_transformer(layers=2)) as applied:
        assert bool(generate(two).isfinite().all())
        assert applied.summary().steps["step"] == 1


@pytest.mark.usefixtures("movable")
def test_both_experts_count(pipe: WanPipeline, generate: Generate) -> None:
    two, small = experts(pipe), wan_transformer(layers=2)
    with accelerate(two, handoff(pipe), small=small, offload="lazy") as applied:
        generate(two)
        peak = applied.summary().peak_weight_bytes
    assert peak == sum(map(weight_bytes, (two.transformer, two.transformer_2, small)))


@pytest.mark.usefixtures("movable")
def test_an_interrupted_call_brings_the_large_model_back(
    pipe: WanPipeline, generate: Generate
) -> None:
    small = wan_transformer(layers=2, seed=7)
    policy = handoff(pipe)
    wanted = _handed(pipe, policy, small, generate)

    def fail(pipe: Any, step: int, timestep: Any, kwargs: Any) -> Any:
        if step == STEPS - 2:
            raise KeyboardInterrupt
        return kwargs

    with accelerate(pipe, policy, small=small, offload="swap") as applied:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=fail)
        assert torch.equal(wanted, generate(pipe))
        assert applied.summary().peak_weight_bytes == weight_bytes(pipe.transformer)


@pytest.mark.usefixtures("movable")
def test_a_plain_call_after_an_interrupted_one_finds_its_model(
    pipe: WanPipeline, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == STEPS - 2:
            raise KeyboardInterrupt
        return {}

    with accelerate(pipe, handoff(pipe), small=wan_transformer(layers=2), offload="swap") as on:
        with pytest.raises(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=stop)
        residence = on._residence
        assert residence is not None
        assert residence._large is not None
        assert not residence._large._there
        monkeypatch.setenv("DITUNE_DISABLE", "1")
        there: list[bool] = []
        found = residence._large
        pipe.transformer.blocks[0].register_forward_pre_hook(lambda *_: there.append(found._there))
        generate(pipe)
        assert all(there)
        assert len(there) == 2 * STEPS


def test_weights_go_and_come_back_unchanged() -> None:
    model = wan_transformer(layers=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = Weights(model, CPU)
    places = [p.data_ptr() for p in model.parameters()]
    for _ in range(2):
        weights.release()
        assert weights.device_bytes == 0
        assert not set(places) & {p.data_ptr() for p in model.parameters()}
        weights.bring()
        assert weights.device_bytes == weight_bytes(model)
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("offload", "peak"), [("none", (5, 5)), ("lazy", (4, 5)), ("swap", (4, 1))]
)
def test_the_peak_is_known_before(offload: Offload, peak: tuple[int, int]) -> None:
    assert peak_weight_bytes(4, 1, offload) == peak


def test_what_cannot_be_moved_is_refused(
    pipe: WanPipeline, generate: Generate, caplog: pytest.LogCaptureFixture
) -> None:
    small = wan_transformer(layers=2)
    with pytest.raises(UsageFault, match="none, lazy, swap"):
        accelerate(pipe, Policy(), small=small, offload="later")  # type: ignore[arg-type]
    pipe.transformer._hf_hook = object()
    with pytest.raises(UsageFault, match='use offload="lazy"'):
        accelerate(pipe, Policy(), small=small, offload="swap")
    del pipe.transformer._hf_hook
    two = experts(pipe)
    with pytest.raises(UsageFault, match='this pipeline has 2: use offload="lazy"'):
        accelerate(two, Policy(), small=small, offload="swap")
    with accelerate(pipe, handoff(pipe), small=small, offload="swap"):
        generate(pipe)
    assert "moves nothing" in caplog.text


def test_a_small_model_elsewhere_is_noticed_before_the_first_step(
    pipe: WanPipeline, generate: Generate
) -> None:
    with (
        accelerate(pipe, handoff(pipe), small=wan_transformer(layers=2).to("meta")),
        pytest.raises(UsageFault, match="the small model is on meta"),
    ):
        generate(pipe)


def test_what_moves_by_itself_is_left_alone(pipe: WanPipeline, generate: Generate) -> None:
    small = wan_transformer(layers=2)
    alone = wan_transformer(layers=2, seed=7)
    for model in (pipe.transformer, alone):
        model.enable_group_offload(
            onload_device=CPU,
            offload_device=CPU,
            offload_type="block_level",
            num_blocks_per_group=1,
        )
    with pytest.raises(UsageFault, match=r'enable_group_offload.*use offload="lazy"'):
        accelerate(pipe, Policy(), small=small, offload="swap")
    with pytest.raises(UsageFault, match='leave offload at "none"'):
        accelerate(pipe, Policy(), small=alone, offload="lazy")
    with accelerate(pipe, handoff(pipe), small=alone) as applied:
        generate(pipe)
        assert applied.summary().small_forwards
