"""The Triton layer equals the reference; numerics run in the interpreter, in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditune.db.errors import UsageFault
from ditune.db.moe import TileConfig
from ditune.kernels.routing import route
from ditune.kernels.triton_grouped_gemm import grouped_gemm

PROGRAM = Path(__file__).with_name("moe_cases.py")


def run(*arguments: str, **changes: str) -> None:
    root = PROGRAM.parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", **changes}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_every_case_equals_the_reference_in_the_interpreter() -> None:
    run("--quick", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["odd sizes", "holes", "foreign", "eight slots", "65 rows"])
def test_cases_equal_the_reference_on_a_device(case: str) -> None:
    run("--case", case)


def test_tokens_that_are_not_packed_are_refused_where_they_must_be() -> None:
    routing = route(torch.tensor([[1], [0]]), experts=2)
    with pytest.raises(UsageFault, match="packed rows"):
        grouped_gemm(
            torch.ones(2, 16), torch.ones(2, 16, 16), routing, TileConfig(path="tma"), packed=False
        )
