"""A genuine text-to-video system in miniature: a trained `WanPipeline` of a few megabytes.

`load` gives the pipeline, `CALL` the pinned arguments, `captions` the prompts, `judge` the scores.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ditune.miniature.classifier import judge as judge
    from ditune.miniature.language import captions as captions
    from ditune.miniature.system import CALL as CALL
    from ditune.miniature.system import load as load

__all__ = ["CALL", "captions", "judge", "load"]

_PUBLIC = {
    "CALL": "ditune.miniature.system",
    "captions": "ditune.miniature.language",
    "judge": "ditune.miniature.classifier",
    "load": "ditune.miniature.system",
}


def __getattr__(name: str) -> object:
    """Load a public name when it is first asked for."""
    if name not in _PUBLIC:
        raise AttributeError(f"ditune.miniature has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)
