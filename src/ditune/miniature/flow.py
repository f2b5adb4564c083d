"""The training recipe of the denoisers: flow matching with caption dropout, Muon and AdamW.

The large model is trained shallow first and then grown: every block is followed by new ones that
begin as the identity. A step of the shallow model costs a fraction of a step of the deep one.
"""

from __future__ import annotations

import copy
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, distributed, nn

from ditune.miniature import architecture
from ditune.miniature.architecture import Size
from ditune.miniature.clips import render
from ditune.miniature.codec import PatchPca
from ditune.miniature.language import COLOUR_NAMES, MOTIONS
from ditune.miniature.muon import Muon

CAPTION_DROPOUT = 0.12
EMA_DECAY = 0.999
MUON_RATE = 0.02
ADAMW_RATE = 2e-3


class _Batch(NamedTuple):
    clean: Tensor
    noise: Tensor
    sigma: Tensor
    subject: Tensor  # which prompt embedding


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on what: learning rates fall in a line from `start` to `end`."""

    steps: int
    batch: int
    start: float = 1.0
    end: float = 0.0
    warmup_steps: int = 50
    below: float = 1.0  # half of the noise levels are scaled to end here

    def rate(self, step: int) -> float:
        """Return the factor on both learning rates at a step."""
        line = self.start + (self.end - self.start) * step / self.steps
        return line * min(1.0, (step + 1) / self.warmup_steps)


def grow(model: WanTransformer3DModel, size: Size, num_layers: int) -> WanTransformer3DModel:
    """Return a deeper model that computes what `model` computes: new blocks start as the identity.

    Raises:
        ValueError: `num_layers` is not a multiple of the model's depth.
    """
    depth = len(model.blocks)
    if num_layers % depth:
        raise ValueError(f"cannot grow {depth} blocks to {num_layers}: not a multiple")
    grown = architecture.transformer(size, num_layers)
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.")}
    grown.load_state_dict(rest, strict=False)
    each = num_layers // depth
    for index, block in enumerate(grown.blocks):
        if index % each == 0:
            block.load_state_dict(model.blocks[index // each].state_dict())
            continue
        for name, parameter in block.named_parameters():
            if "to_out.0" in name or "ffn.net.2" in name:
                nn.init.zeros_(parameter)
    return grown


class FlowTrainer:
    """Train one denoiser; its whole state can be saved and resumed at any step.

    Where `torch.distributed` is initialised, every process takes its share of the batch and
    gradients are averaged: two processes of one thread beat two threads in one process. On a GPU
    clips are rendered ahead by threads: a step there is shorter than its data.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        pca: PatchPca,
        text: Tensor,
        schedule: Schedule,
        *,
        compiled: bool = False,
    ) -> None:
        """Prepare optimisers and the exponential moving average.

        Args:
            model: The denoiser, trained in place on the device that it is on.
            pca: The codec's encoder.
            text: Prompt embeddings [481, tokens, width], the empty prompt last.
            schedule: Steps, batch size, learning rates and noise levels.
            compiled: Compile the blocks: needs a C++ compiler, and makes a step 1.5x faster.
        """
        self.model = model.train()
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.pca = pca
        self.device = next(model.parameters()).device
        self.text = text.to(self.device)
        self.schedule = schedule
        self.step = 0
        ahead = 1 if self.device.type == "cpu" else os.cpu_count() or 1
        self._renderers = ThreadPoolExecutor(ahead)
        self._ahead = ahead if ahead > 1 else 0
        self._rendered: dict[int, Future[_Batch]] = {}
        together = distributed.is_initialized()
        self.rank = distributed.get_rank() if together else 0
        self.processes = distributed.get_world_size() if together else 1
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inner = name.startswith("blocks.") and parameter.ndim == 2
            (matrices if inner else rest).append(parameter)
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        self.muon = Muon(matrices, lr=MUON_RATE, weight_decay=0.01)
        self.adamw = torch.optim.AdamW(rest, lr=ADAMW_RATE, weight_decay=0.0, betas=(0.9, 0.98))

    def advance(self) -> float:
        """Take one step and return its loss."""
        factor = self.schedule.rate(self.step)
        for group in self.muon.param_groups:
            group["lr"] = MUON_RATE * factor
        for group in self.adamw.param_groups:
            group["lr"] = ADAMW_RATE * factor
        loss = self._loss(self._next_batch())
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step()
        self.adamw.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(
                self.ema.parameters(), self.model.parameters(), strict=True
            ):
                average.lerp_(parameter, 1.0 - decay)
        self.step += 1
        return float(loss.detach())

    def _average_gradients(self) -> None:
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = flat.div_(self.processes).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _next_batch(self) -> _Batch:
        """Return the batch of this step; those of the next ones are begun."""
        for step in range(self.step, min(self.step + self._ahead, self.schedule.steps) + 1):
            if step not in self._rendered:
                self._rendered[step] = self._renderers.submit(self._batch, step)
        return self._rendered.pop(self.step).result()

    def _batch(self, step: int) -> _Batch:
        """Return fresh clips with noise; noise levels lean to the noisier ones.

        They follow from step and rank alone, the same in every run: resuming needs no generator's
        state.
        """
        count = self.schedule.batch // self.processes
        generator = torch.Generator().manual_seed((step << 8) + self.rank)
        clips = render(count, generator)
        clean = self.pca.encode(clips.frames)
        subject = (clips.digit * len(COLOUR_NAMES) + clips.colour) * len(MOTIONS) + clips.motion
        dropped = torch.rand(count, generator=generator) < CAPTION_DROPOUT
        subject = torch.where(dropped, len(self.text) - 1, subject)
        sigma = torch.sigmoid(torch.randn(count, generator=generator) * 1.2 + 0.7)
        uniform = torch.rand(count, 2, generator=generator)
        sigma = torch.where(uniform[:, 0] < 0.1, uniform[:, 1], sigma)
        sigma[::2] *= self.schedule.below
        noise = torch.randn(clean.shape, generator=generator)
        return _Batch(clean, noise, sigma, subject)

    def _loss(self, batch: _Batch) -> Tensor:
        """Return the velocity error on a batch."""
        clean, noise, sigma, subject = (each.to(self.device) for each in batch)
        noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1, 1))
        velocity = self.model(noisy, sigma * 1000.0, self.text[subject], return_dict=False)[0]
        loss: Tensor = (velocity - (noise - clean)).square().mean()
        return loss

    def save(self, path: Path) -> None:
        """Write the whole training state, atomically."""
        state: dict[str, Any] = {
            "step": self.step,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }
        fresh = path.with_suffix(".new")
        torch.save(state, fresh)
        os.replace(fresh, path)

    def resume(self, path: Path) -> None:
        """Read a state written by `save`."""
        state = torch.load(path, weights_only=True)
        self.step = int(state["step"])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
