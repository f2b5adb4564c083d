"""Tuning a pipeline that a program holds already, in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditune.accel.lookup import default_database
from ditune.db.engine import study_storage_url
from ditune.db.errors import NoFeasiblePolicy
from ditune.db.policy import Policy
from ditune.db.store import Store
from ditune.tuner.result import Options, Result
from ditune.tuner.session import Session
from ditune.tuner.source import FolderSource


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    quality: str,
    call: Mapping[str, Any] | None = None,
    small: Any | None = None,
    trials: int = 20,
) -> Policy:
    """Search, prove and store a policy for a live pipeline, in this process.

    The policy goes into `$DITUNE_DB` or the user's data folder, where `accelerate` finds it. A
    generation that hangs here hangs the search.

    Args:
        pipe: A diffusers pipeline on its device.
        prompts: Every other one is held out for the proof.
        quality: Floors, for example "psnr>=30,psnr_worst>=22".
        call: The pipeline's arguments besides the prompt.
        small: The small model of the family, for hand-offs.
        trials: How many policies to try.

    Raises:
        NoFeasiblePolicy: Nothing held the floors; the message says how close it came.
        UsageFault: The floors or prompts are not usable.
    """
    result = _tuned(_source(pipe, prompts, call, small), Options(quality=quality, trials=trials))
    if result.policy_file is None:
        raise NoFeasiblePolicy(f"no policy holds {quality}: {result.best_seen()}")
    return result.policy_file.policy


def tune_tiers(
    pipe: Any,
    prompts: Sequence[str],
    *,
    tiers: str,
    call: Mapping[str, Any] | None = None,
    small: Any | None = None,
    trials: int = 20,
) -> dict[str, Policy]:
    """Search, prove and store a policy for each of several tiers, as `tune` does for one.

    `accelerate(pipe, tier=NAME)` finds each under its name, `accelerate(pipe)` the first one.

    Args:
        pipe: A diffusers pipeline on its device.
        prompts: Every other one is held out for the proofs.
        tiers: Names that stand for floors or have some, for example
            "high;draft:psnr>=28,psnr_worst>=20".
        call: The pipeline's arguments besides the prompt.
        small: The small model of the family, for hand-offs.
        trials: How many policies to try for the first tier; the others take a third.

    Returns:
        The policies by tier, in order; a tier whose floors nothing held is left out.

    Raises:
        NoFeasiblePolicy: No tier has a policy; the message says how close the first one came.
        UsageFault: The tiers or prompts are not usable.
    """
    result = _tuned(_source(pipe, prompts, call, small), Options(tiers=tiers, trials=trials))
    if not result.shipped:
        raise NoFeasiblePolicy(f"no policy holds any tier of {tiers}: {result.best_seen()}")
    found = {name: each.policy_file for name, each in result.tiers.items()}
    return {name: each.policy for name, each in found.items() if each is not None}


def _source(
    pipe: Any, prompts: Sequence[str], call: Mapping[str, Any] | None, small: Any | None
) -> FolderSource:
    return FolderSource(
        name=type(pipe).__name__,
        pipe=pipe,
        small=small,
        call=dict(call or {}),
        calibration=tuple(prompts[0::2]),
        held_out=tuple(prompts[1::2]),
    )


def _tuned(source: FolderSource, options: Options) -> Result:
    url = str(default_database())
    with Store.open(url) as store:
        return Session(source, store, options).run(study_storage_url(url))
