"""The digest that tells a tuning's kernels from others."""

from __future__ import annotations

from pathlib import Path

from ditune.kernels import digest


def test_it_changes_with_the_kernels_and_with_nothing_else(tmp_path: Path) -> None:
    def found(**files: str) -> str:
        digest.kernels_digest.cache_clear()
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        return digest.kernels_digest(tmp_path)

    first = found(triton_moe="a", routing="b")
    assert found(hardware="c") == first
    changed = found(routing="d")
    assert changed != first
    assert found(cpu_tiles="e") not in (first, changed)


def test_it_covers_the_kernels_that_are_here() -> None:
    digest.kernels_digest.cache_clear()
    folder = Path(digest.__file__).parent
    covered = {path.name for pattern in digest.DECIDING for path in folder.glob(pattern)}
    assert {"routing.py", "task_map.py", "triton_grouped_gemm.py", "triton_moe.py"} <= covered
    assert digest.kernels_digest() == digest.kernels_digest(folder)
