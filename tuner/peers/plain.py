"""The peer that every user has already: the same pipeline with fewer steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ditune.tuner.peers.contract import Setting
from ditune.tuner.source import Source

_FEWEST = 4


def settings(source: Source) -> list[Setting]:
    """Return every number of steps below the source's own, the most first."""
    full = int(source.call["num_inference_steps"])
    counts = range(full - 1, _FEWEST - 1, -1)
    return [Setting(f"{count} steps", partial(_called, steps=count)) for count in counts]


@contextmanager
def _called(pipe: Any, steps: int) -> Iterator[Mapping[str, Any]]:
    yield {"num_inference_steps": steps}
