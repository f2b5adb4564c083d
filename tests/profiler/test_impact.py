from __future__ import annotations

import torch
from diffusers import WanPipeline
from tests.conftest import Generate

from ditune.profiler.impact import impacts

CALL = {
    "negative_prompt_embeds": torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(9)),
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 12,
}


def test_errors_of_guidance_weigh_more_the_stronger_it_is(prompted: WanPipeline) -> None:
    weak = impacts(prompted, "x", call={**CALL, "guidance_scale": 1.5})
    strong = impacts(prompted, "x", call={**CALL, "guidance_scale": 12.0})
    assert weak is not None
    assert strong is not None
    assert weak.cfg is not None
    assert strong.cfg is not None
    assert max(strong.step, strong.cfg, strong.block or 0.0) == 1.0
    assert strong.cfg / strong.step > 1.2 * weak.cfg / weak.step


def test_one_branch_has_no_cfg(prompted: WanPipeline) -> None:
    found = impacts(prompted, "x", call={**CALL, "guidance_scale": 1.0})
    assert found is not None
    assert found.cfg is None
    assert found.block is not None


def test_the_pipeline_is_left_as_it_was(prompted: WanPipeline, generate: Generate) -> None:
    plain = prompted(
        prompt="x",
        **CALL,
        output_type="latent",
        return_dict=False,
        generator=torch.Generator().manual_seed(1),
    )[0]
    impacts(prompted, "x", call=CALL)
    again = prompted(
        prompt="x",
        **CALL,
        output_type="latent",
        return_dict=False,
        generator=torch.Generator().manual_seed(1),
    )[0]
    assert torch.equal(plain, again)


def test_earlier_steps_are_not_computed_again(prompted: WanPipeline) -> None:
    ran = 0

    def count(*_: object) -> None:
        nonlocal ran
        ran += 1

    prompted.transformer.blocks[0].register_forward_hook(count)
    told: list[int] = []
    impacts(prompted, "x", call=CALL, at=(0.75,), spent=told.append)
    # 24 plainly; then from step 9 on: 6 for step, 6 for cfg, 6 and 2 with noise for block
    assert ran == 24 + 6 + 6 + 8
    assert told == [ran]
