"""Records built by hand, and a store on a fresh SQLite file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from ditune.db.policy import MaskCache, Policy
from ditune.db.records import (
    Constraint,
    Evidence,
    Hardware,
    Interval,
    PolicyFile,
    Profile,
    Quality,
    Settings,
    Software,
    Study,
    Trial,
    Workload,
)
from ditune.db.store import Store

MakeFile = Callable[..., PolicyFile]
ReadOnly = Callable[[Path], AbstractContextManager[None]]
HARDWARE = Hardware(
    device_name="Test CPU", kind="cpu", capability="avx512", cores=2, memory_bytes=1 << 30
)
SOFTWARE = Software(
    torch="2.13.0", triton="3.7.1", diffusers="0.42.1", transformers="5.23.0", ditune="0.1.0"
)
WORKLOAD = Workload(
    pipeline_class="WanPipeline",
    transformer_class="WanTransformer3DModel",
    model_digest="sha256:" + "a" * 64,
    model_revision="r1",
    dtype="float32",
    height=32,
    width=32,
    frames=13,
    steps=4,
    scheduler_class="FlowMatchEulerDiscreteScheduler",
    scheduler_shift=8.0,
    guidance=True,
    batch=1,
    attention_backend="native",
)
EVIDENCE = Evidence(
    speedup=Interval(median=1.8, ci95=(1.7, 1.9), n=12),
    baseline_ms=4000.0,
    tuned_ms=2200.0,
    quality={"psnr": Quality(floor=35.0, mean=40.0, worst=36.0, n=12)},
    bound_by="psnr",
    candidates=1,
    prompts_digest="sha256:" + "b" * 64,
    study="study-1",
    git_commit=None,
    created_at="2026-01-02T03:04:05Z",
    status="measured",
)


@pytest.fixture
def make_file() -> MakeFile:
    """Return a function that builds policy files; changes replace whole records."""

    def make(last: str = "step", **changes: Any) -> PolicyFile:
        mask = MaskCache(actions=("full", "full", "step", last))  # type: ignore[arg-type]
        return file_of(Policy(cache=mask), **changes)

    return make


def file_of(policy: Policy, **changes: Any) -> PolicyFile:
    """Return the file of a policy as if it had been proved here."""
    parts: dict[str, Any] = {
        "policy_id": policy.id,
        "hardware": HARDWARE,
        "software": SOFTWARE,
        "workload": WORKLOAD,
        "policy": policy,
        "evidence": EVIDENCE,
    }
    return PolicyFile(**(parts | changes))


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "policies.db"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that any user may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        folder.chmod(0o755)


@pytest.fixture
def read_only() -> ReadOnly:
    """Return a block in which a folder cannot be written, not even if root runs the tests."""

    @contextmanager
    def block(folder: Path) -> Iterator[None]:
        root = os.geteuid() == 0
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)

    return block


@pytest.fixture
def store(database: Path) -> Iterator[Store]:
    with Store.open(str(database)) as opened:
        yield opened


@pytest.fixture
def study() -> Study:
    settings = Settings(
        hardware=HARDWARE,
        software=SOFTWARE,
        workload=WORKLOAD,
        constraints=(Constraint(metric="psnr", statistic="mean", floor=35.0),),
        prompts_digest="sha256:" + "c" * 64,
        seed=0,
        space="sha256:" + "d" * 64,
    )
    return Study(name=settings.study, settings=settings, created_at="2026-01-01T00:00:00Z")


@pytest.fixture
def trial(study: Study) -> Trial:
    return Trial(
        uuid="u0",
        study=study.name,
        number=0,
        source="baseline",
        policy=Policy(),
        state="complete",
        speedup=1.0,
        work_ratio=1.0,
        quality={"psnr": Quality(floor=35.0, mean=100.0, worst=100.0, n=4)},
        violation={"psnr": -1.0},
        reason=None,
        duration_s=8.0,
        created_at="2026-01-01T00:00:01Z",
    )


@pytest.fixture
def profile() -> Profile:
    return Profile(
        hardware=HARDWARE,
        software=SOFTWARE,
        workload=WORKLOAD,
        prompts=2,
        total_ms=4000.0,
        layers=(),
        redundancy=(),
        disagreement=None,
        peak_bytes=None,
        clocks=None,
    )
