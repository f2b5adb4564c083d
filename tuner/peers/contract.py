"""What a peer is to the benchmark: settings to sweep, each of which can be put on a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ditune.accel.anatomy import denoisers
from ditune.db.policy import Policy

On = Callable[[Any], AbstractContextManager[Mapping[str, Any]]]


@dataclass(frozen=True)
class Setting:
    """One configuration of a peer.

    Attributes:
        label: Its knobs as a table shows them; unique within the peer.
        on: Puts it on a pipeline for the duration of a `with`, which gives the arguments of the
            pipeline that it changes; afterwards the pipeline is what it was.
        policy: What it is as a policy of ours, None where it is not one.
    """

    label: str
    on: On = field(compare=False, repr=False)
    policy: Policy | None = field(default=None, compare=False, repr=False)


@contextmanager
def cached(pipe: Any, config: Any) -> Iterator[Mapping[str, Any]]:
    """Switch one of diffusers' own caches on for every denoiser of a pipeline."""
    models: list[Any] = list(denoisers(pipe))
    on: list[Any] = []
    try:
        for model in models:
            model.enable_cache(config)
            on.append(model)
        yield {}
    finally:
        for model in on:
            model.disable_cache()
