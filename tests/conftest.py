"""A real `WanPipeline` with random weights: small enough for unit tests, whole enough to be run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from hypothesis import HealthCheck, settings
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool
from torch import Tensor, nn

STEPS = 12
SERVER = "DITUNE_TEST_POSTGRES"  # the URL of an empty database; its tables are dropped
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # of tests in several processes, such as gw0


def pytest_configure() -> None:
    """Let no test fail because it was slow; leave the other cores to the other processes."""
    slow = (HealthCheck.too_slow,)
    settings.register_profile("untimed", deadline=None, suppress_health_check=slow)
    settings.load_profile("untimed")
    if WORKER:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def no_users_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep tests away from the policies of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITUNE_DB", str(tmp_path_factory.mktemp("user") / "policies.db"))
        yield


@pytest.fixture
def server_database() -> str:
    """Return the URL of an empty PostgreSQL database, of each process its own."""
    if SERVER not in os.environ:
        pytest.skip(f"needs the URL of a PostgreSQL database in {SERVER}")
    url = os.environ[SERVER]
    if WORKER:
        url = _beside(url)
    with create_engine(url, poolclass=NullPool).begin() as connection:
        for schema in ("public", "ditune_study"):
            connection.execute(text(f"DROP SCHEMA IF EXISTS {schema} CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return url


def _beside(url: str) -> str:
    """Return the URL of this process's database on the same server, which is made if missing."""
    given = make_url(url)
    name = f"{given.database}_{WORKER}"
    engine = create_engine(given, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        known = connection.execute(
            text("SELECT 1 FROM pg_database WHERE datname = :n"), {"n": name}
        )
        if known.first() is None:
            connection.execute(text(f'CREATE DATABASE "{name}"'))
    return given.set(database=name).render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "policies.db")
    url: str = request.getfixturevalue("server_database")
    return url


Generate = Callable[..., Tensor]


def wan_transformer(layers: int = 4, seed: int = 0) -> WanTransformer3DModel:
    """Return a tiny transformer with random weights."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    ).eval()


def wan_pipeline(layers: int = 4, seed: int = 0) -> WanPipeline:
    """Return a pipeline around it that takes prompt embeddings and gives latents."""
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(layers, seed),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe() -> WanPipeline:
    return wan_pipeline()


def two_experts(pipe: WanPipeline, second: nn.Module, boundary_ratio: float) -> WanPipeline:
    """Return a pipeline that goes from a pipeline's transformer to a second one."""
    two = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=pipe.scheduler,
        transformer=pipe.transformer,
        transformer_2=second,
        boundary_ratio=boundary_ratio,
    )
    two.set_progress_bar_config(disable=True)
    return two


def tiny_vae() -> AutoencoderKLWan:
    """Return a tiny codec with random weights, four frames to a latent after the first."""
    torch.manual_seed(3)
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


@pytest.fixture
def prompted(pipe: WanPipeline, monkeypatch: pytest.MonkeyPatch) -> WanPipeline:
    """Return the tiny pipeline taking a prompt: without a text encoder it becomes embeddings."""
    take_prompts(monkeypatch)
    return pipe


def take_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `WanPipeline` turn a prompt into embeddings by its checksum."""
    original: Callable[..., Any] = WanPipeline.__call__

    def called(self: WanPipeline, prompt: str, **arguments: Any) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        embeds = torch.randn(1, 6, 32, generator=generator)
        return original(self, prompt_embeds=embeds, **arguments)

    monkeypatch.setattr(WanPipeline, "__call__", called)


@pytest.fixture
def small() -> WanTransformer3DModel:
    return wan_transformer(layers=2, seed=1)


@pytest.fixture
def generate() -> Generate:
    """Return a function that calls a pipeline with fixed embeddings and noise."""
    source = torch.Generator().manual_seed(0)
    cond = torch.randn(1, 6, 32, generator=source)
    uncond = torch.randn(1, 6, 32, generator=source)

    def call(pipe: WanPipeline, steps: int = STEPS, **changes: object) -> Tensor:
        device = pipe._execution_device
        arguments = {
            "prompt_embeds": cond.to(device),
            "negative_prompt_embeds": uncond.to(device),
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
            "generator": torch.Generator().manual_seed(1),
            "output_type": "latent",
            "return_dict": False,
        }
        latents: Tensor = pipe(**(arguments | changes))[0]
        return latents

    return call
