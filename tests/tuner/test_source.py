from __future__ import annotations

from pathlib import Path

import pytest

from ditune.db.errors import UsageFault
from ditune.tuner.source import (
    PROMPT_CHARACTERS_MAX,
    FolderSource,
    prompts_digest,
    read_prompts,
    registered,
    require_loadable,
)


def test_prompts_are_lines_without_the_empty_ones(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b" \n\n", "is empty"),
        (b"\xff\xfe\x00", "cannot read the prompt file"),
        (b"ok\n" + b"x" * (PROMPT_CHARACTERS_MAX + 7), f"({PROMPT_CHARACTERS_MAX + 7})"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(data)
    with pytest.raises(UsageFault) as caught:
        read_prompts(path)
    assert says in str(caught.value)


def test_what_is_no_pipeline_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="no model folder"):
        require_loadable(str(tmp_path / "nowhere"), 20)
    with pytest.raises(UsageFault, match="model_index"):
        require_loadable(str(tmp_path), 20)
    require_loadable("someone/some-model", 20)  # a hub id: diffusers decides
    with pytest.raises(UsageFault, match="at least 8 prompts"):
        require_loadable("someone/some-model", 7)


def test_unregistered_names_are_refused() -> None:
    with pytest.raises(UsageFault, match="miniature"):
        registered("maxiature")


def test_the_split_belongs_to_the_digest() -> None:
    def source(calibration: tuple[str, ...], held_out: tuple[str, ...]) -> FolderSource:
        return FolderSource("s", None, None, {}, calibration, held_out)

    assert prompts_digest(source(("a", "b"), ("c",))) != prompts_digest(source(("a",), ("b", "c")))
