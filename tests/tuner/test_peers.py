"""Every peer on the tiny pipeline: it does something, and takes itself off again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from ditune.profiler.work import WorkCounter
from ditune.tuner.peers.catalogue import PEERS
from ditune.tuner.source import FolderSource

CALL = {
    "negative_prompt_embeds": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(9)),
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 20,
    "output_type": "latent",
    "return_dict": False,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of the peers' own code


@pytest.fixture
def source(prompted: WanPipeline) -> FolderSource:
    return FolderSource("tiny", prompted, None, CALL, ("a",), ("b",))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_leaves_work_out_and_the_pipeline_as_it_was(source: FolderSource, name: str) -> None:
    if name.startswith("DBCache"):
        pytest.importorskip("cache_dit", reason='pip install "ditune[peers]"')

    def run(**changes: Any) -> tuple[torch.Tensor, int]:
        arguments = {**CALL, **changes}
        with WorkCounter() as counter:
            latents = source.pipe(
                prompt="a", generator=torch.Generator().manual_seed(1), **arguments
            )[0]
        return latents, counter.flops

    plain, flops = run()
    settings = PEERS[name](source)
    assert len({setting.label for setting in settings}) == len(settings) >= 16
    fastest = settings[-1]
    with fastest.on(source.pipe) as changes:
        latents, fewer = run(**changes)
    assert fewer < 0.8 * flops
    assert not torch.equal(latents, plain)
    assert torch.equal(plain, run()[0])
