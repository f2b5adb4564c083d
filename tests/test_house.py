"""House rules that no linter knows: who imports whom, what hangs where, how big code may grow."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "ditune"
LINKED = ("accel", "db", "kernels", "profiler", "reports", "tuner")  # real folders in the root
MAY_IMPORT: dict[str, set[str]] = {  # room -> what it may use of ours; the rest is a broken wall
    "db": set(),
    "kernels": {"db"},
    "accel": {"db", "kernels"},
    "profiler": {"accel", "db"},
    "tuner": {"accel", "db", "kernels", "profiler"},
    "reports": {"db"},
    "miniature": {"db.records", "db.errors"},
    "cli": {"accel", "db", "kernels", "miniature", "profiler", "reports", "tuner"},
}
MINIATURE_MAY_USE = {
    "diffusers",
    "ditune",
    "numpy",
    "safetensors",
    "sklearn",
    "tokenizers",
    "torch",
    "transformers",
} | sys.stdlib_module_names
HEAVY = {
    "diffusers",
    "optuna",
    "pandas",
    "plotly",
    "sklearn",
    "sqlalchemy",
    "torch",
    "transformers",
    "triton",
}
IMPORT_BY_NAME = ("import_module", "__import__")
FILE_CAP = 400  # lines
FUNCTION_CAP = 50  # lines of a body, without signature and docstring
KERNEL_CAP = 120  # the same of a Triton kernel


def files(room: str) -> list[Path]:
    """Every Python file of a room, by its real path."""
    return sorted((PACKAGE / room).resolve().rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module or name that `path` imports, wherever the import stands, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORT_BY_NAME):
            names = (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))
            yield from ((node.lineno, str(name)) for name in names)


def breaks_wall(room: str, name: str) -> bool:
    """Whether `room` must not import `name`."""
    top = name.partition(".")[0]
    if top != "ditune":
        return top == "" or top in LINKED  # relative, or a bare folder name: a second copy
    doors = MAY_IMPORT[room] | {room, "__version__"}
    return not any(f"{name}.".startswith(f"ditune.{door}.") for door in doors)


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a function's body spans, without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def cap(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines the function's body may have."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return KERNEL_CAP if any(name.startswith("triton.jit") for name in decorators) else FUNCTION_CAP


def too_long(path: Path) -> Iterator[str]:
    """Every function of `path` that is longer than it may be, in words."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        count = body_lines(node)
        if count > cap(node):
            where = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            yield f"{where} has {count} lines, the cap is {cap(node)}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_room_imports_only_rooms_below(room: str) -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(room)
        for line, name in imports(path)
        if breaks_wall(room, name)
    ]
    assert not broken, f"{room}/ may use only {sorted(MAY_IMPORT[room])}:\n" + "\n".join(broken)


def test_miniature_uses_only_what_trains_and_runs_it() -> None:
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files("miniature")
        for line, name in imports(path)
        if name.partition(".")[0] not in MINIATURE_MAY_USE
    ]
    assert not broken, "miniature/ uses only what trains and runs it:\n" + "\n".join(broken)


def test_every_room_has_a_rule_and_hangs_in_the_package() -> None:
    found = {entry.name for entry in PACKAGE.iterdir() if entry.is_dir()} - {"__pycache__"}
    differ = sorted(found ^ set(MAY_IMPORT))
    assert not differ, f"in src/ditune/ or in MAY_IMPORT, but not in both: {differ}"
    for room in LINKED:
        link = PACKAGE / room
        assert link.is_symlink(), f"{link} must be a link, not a copy: ln -s ../../{room} {link}"
        assert link.readlink() == Path("../..", room), f"{link} must point to ../../{room}"
        assert files(room), f"{room}/ holds no Python file: the other rules see nothing there"


def test_kernels_is_not_importable_by_its_bare_name() -> None:
    hides = ROOT / "kernels" / "__init__.py"
    assert not hides.exists(), f"{hides} would hide Hugging Face's `kernels` package"
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or Path(spec.origin).resolve() != hides


def test_every_package_is_named_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = set(tomllib.loads(text)["tool"]["setuptools"]["packages"])
    needed = {
        ".".join(["ditune", room, *path.parent.relative_to((PACKAGE / room).resolve()).parts])
        for room in MAY_IMPORT
        for path in files(room)
    }
    assert needed <= named, f"add to [tool.setuptools] packages: {sorted(needed - named)}"


@pytest.mark.parametrize("module", ["ditune", "ditune.accel.lookup"])
def test_front_door_and_lookup_are_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({HEAVY} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    seen = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert seen.stdout.strip() == "[]", f"import {module} loads {seen.stdout}{seen.stderr}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_nothing_outgrows_its_cap(room: str) -> None:
    big = [
        f"{path.relative_to(ROOT)} has {count} lines, the cap is {FILE_CAP}"
        for path in files(room)
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > FILE_CAP
    ]
    big += [line for path in files(room) for line in too_long(path)]
    assert not big, "split these by what they do:\n" + "\n".join(big)


def test_each_make_target_explains_itself() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = text.partition(".PHONY:")[2].partition("\n")[0].split()
    silent = [name for name in targets if not re.search(rf"^{name}:.*## \S", text, re.MULTILINE)]
    assert not silent, f"write `## what it does` behind these targets: {silent}"
