"""Forms of reuse on models small enough to know what comes out: each is exact on its own kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

from ditune.accel.apply import accelerate
from ditune.db.policy import Action, MaskCache, Payload, Policy, RuleCache

STEPS = 6
Form = Literal["hidden", "latent", "output"]
Rule = Callable[
    [Tensor, int, str], Tensor
]  # what the model says to an input, at a step, per branch


class Block(nn.Module):
    """Adds what the toy was told to."""

    def forward(self, hidden_states: Tensor, added: Tensor) -> Tensor:
        return hidden_states + added


class Toy(nn.Module, CacheMixin):  # type: ignore[misc]  # diffusers' names count as Any
    """A model of one block whose answer is a rule of its input, step and branch."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()])
        self.rule = rule
        self.ran: list[tuple[int, str]] = []

    def forward(self, hidden_states: Tensor, step: int, branch: str) -> Tensor:
        self.ran.append((step, branch))
        wanted = self.rule(hidden_states, step, branch)
        out: Tensor = self.blocks[0](hidden_states, wanted - hidden_states)
        return out


class ToyPipe:
    """Two branches a step on inputs that change from step to step."""

    def __init__(self, rule: Rule) -> None:
        self.transformer = Toy(rule)
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(STEPS)
        self.do_classifier_free_guidance = True

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        outputs = []
        model: Any = self.transformer
        for step in range(STEPS):
            latents = torch.linspace(-1.0, 1.0, 16).reshape(1, 1, 4, 4) * (1.0 + step)
            for branch in ("cond", "uncond"):
                context = {"step_index": step, "num_inference_steps": STEPS, "sigma": 0.5}
                with model.cache_context(branch, **context):
                    outputs.append(model(hidden_states=latents, step=step, branch=branch).clone())
        return outputs


def constant(_: Tensor, step: int, branch: str) -> Tensor:
    return torch.full((1, 1, 4, 4), 2.0 if branch == "cond" else 3.0)


def shifted(latents: Tensor, step: int, branch: str) -> Tensor:
    return latents + (2.0 if branch == "cond" else 3.0)


def drifting(_: Tensor, step: int, branch: str) -> Tensor:
    return torch.full((1, 1, 4, 4), 2.0 + 0.5 * step)


ARC = (0.0, 1.0, 4.0, 9.0, 16.0, 25.0)


def hastening(_: Tensor, step: int, branch: str) -> Tensor:
    return torch.full((1, 1, 4, 4), 2.0 + 0.5 * ARC[step])


def parting(latents: Tensor, step: int, branch: str) -> Tensor:
    """Answers that jump about, at a constant distance between the branches."""
    return latents.sin() * (step + 1) ** 2 + (0.0 if branch == "cond" else 1.5)


def run(rule: Rule, actions: tuple[Action, ...], payload: Payload) -> tuple[list[Tensor], Toy]:
    pipe = ToyPipe(rule)
    with accelerate(pipe, Policy(cache=MaskCache(actions=actions, payload=payload, fn_blocks=0))):
        return pipe.run(), pipe.transformer


@pytest.mark.parametrize(
    ("rule", "form", "order"),
    [
        (constant, "output", 0),
        (shifted, "latent", 0),
        (shifted, "hidden", 0),
        (drifting, "output", 1),
        (drifting, "output", 2),
    ],
)
def test_a_form_is_exact_on_the_model_it_is_made_for(rule: Rule, form: Form, order: int) -> None:
    actions: tuple[Action, ...] = ("full", "full", "full", "step", "step", "step")
    outputs, model = run(rule, actions, Payload(form=form, order=order))
    # the hidden form runs the model around its blocks, the others do not
    assert len(model.ran) == (2 * STEPS if form == "hidden" else 6)
    for got, wanted in zip(outputs, ToyPipe(rule).run(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_line_over_arc_length_is_exact_where_outputs_hasten() -> None:
    actions: tuple[Action, ...] = ("full", "full", "step", "step", "step", "step")
    wanted = ToyPipe(hastening).run()
    outputs, _ = run(hastening, actions, Payload(order=1, arc_length=ARC))
    for got, right in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(got, right)
    over_numbers, _ = run(hastening, actions, Payload(order=1))
    assert not torch.allclose(over_numbers[-1], wanted[-1], rtol=0.1)


def test_a_rule_takes_what_lies_between_on_another_number_of_steps() -> None:
    """A straight arc of three steps is one of six: the numbers' own."""
    pipes = [ToyPipe(drifting) for _ in range(2)]
    found = []
    for pipe, arc in zip(pipes, (None, (0.0, 2.5, 5.0)), strict=True):
        payload = Payload(order=1, arc_length=arc)
        rule = RuleCache(warmup_frac=0.3, payload=payload, allowed=("step",))
        with accelerate(pipe, Policy(cache=rule)):
            found.append(pipe.run())
    assert len(pipes[0].transformer.ran) < 2 * STEPS
    assert pipes[0].transformer.ran == pipes[1].transformer.ran
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("rule", "form"), [(shifted, "output"), (constant, "latent")])
def test_a_form_is_wrong_on_another_model(rule: Rule, form: Form) -> None:
    actions: tuple[Action, ...] = ("full", "full", "step", "step", "step", "step")
    outputs, _ = run(rule, actions, Payload(form=form, order=0))
    assert not torch.allclose(outputs[-1], ToyPipe(rule).run()[-1])


def test_the_difference_of_branches_is_exact_where_it_is_constant() -> None:
    actions: tuple[Action, ...] = ("full", "full", "cfg", "cfg", "full", "cfg")
    outputs, model = run(parting, actions, Payload(order=0))
    assert (2, "uncond") not in model.ran
    assert (2, "cond") in model.ran
    for got, wanted in zip(outputs, ToyPipe(parting).run(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_amplified_differences_are_a_tenth_larger() -> None:
    actions: tuple[Action, ...] = ("full", "full", "cfg", "cfg", "cfg", "cfg")
    plain, _ = run(parting, actions, Payload(order=0))
    amplified, _ = run(parting, actions, Payload(order=0, cfg_form="fft_delta"))
    assert torch.equal(plain[4], amplified[4])  # the conditional output
    early = amplified[5] - amplified[4]  # a constant is all low frequency: scaled before 0.8
    torch.testing.assert_close(early, torch.full_like(early, 1.5 * 1.1))
    late = amplified[11] - amplified[10]  # step 5 of 6: only high frequencies are
    torch.testing.assert_close(late, torch.full_like(late, 1.5))


def test_both_branches_take_the_same_action_at_every_step() -> None:
    """Rules 1 and 3: one granularity a step, and no branch older than the other."""
    actions: tuple[Action, ...] = ("full", "full", "step", "cfg", "full", "step")
    _, model = run(parting, actions, Payload())
    ran = {step: [b for s, b in model.ran if s == step] for step in range(STEPS)}
    both = ["cond", "uncond"]
    assert ran == {0: both, 1: both, 2: [], 3: ["cond"], 4: both, 5: []}
