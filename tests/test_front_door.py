"""The public names of `import ditune`: given out lazily, and listed."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

import ditune

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", [name for name in ditune.__all__ if name != "__version__"])
def test_public_name_loads(name: str) -> None:
    value = getattr(ditune, name)
    assert value.__name__ in {name, f"ditune.{name}"}


def test_unknown_name_names_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no 'speedup'; public names: .*lookup"):
        ditune.speedup  # noqa: B018


def test_all_names_are_listed() -> None:
    assert set(ditune.__all__) <= set(dir(ditune))


@pytest.mark.parametrize(
    ("table", "name"),
    [("scripts", "tune"), ("ditune.pipelines", "miniature"), ("ditune.metrics", "judge")],
)
def test_entry_point_names_what_exists(table: str, name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tables = {"scripts": project["scripts"], **project["entry-points"]}
    module, _, attribute = tables[table][name].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))


def test_constraints_keep_torch_and_triton_together() -> None:
    pins = set((ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    assert {"torch==2.13.0", "triton==3.7.1"} <= pins
    assert not any(pin.startswith("pynvml==") for pin in pins), "nvidia-ml-py is the module pynvml"
