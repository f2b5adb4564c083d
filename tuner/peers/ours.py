"""ditune in its own benchmark: the search that users run, on the prompts that the peers get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ditune.accel.apply import accelerate
from ditune.db.policy import Policy
from ditune.db.records import Trial
from ditune.profiler.record import Recorded, record
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.pace import candidates
from ditune.tuner.peers.contract import Setting
from ditune.tuner.search import Budget
from ditune.tuner.source import Source
from ditune.tuner.space import Space
from ditune.tuner.studies import searched, settings_of

NAME = "ditune"
_PROFILED = 2  # prompts
_SEED = 1_000
_SEARCHES = "search.db"


def profiled(source: Source) -> Recorded:
    """Return the profile that searches rest on."""
    return record(source.pipe, source.calibration[:_PROFILED], call=source.call, seed=_SEED)


def fastest(
    evaluator: Evaluator,
    recorded: Recorded,
    cases: Sequence[Case],
    folder: Path,
    budget: Budget,
    progress: Callable[[Trial, int], None],
) -> list[Setting]:
    """Search for the floors of an evaluator; return what held them, the fastest first.

    Args:
        evaluator: Of the source, with the floors.
        recorded: Its profile and trajectories.
        cases: The calibration prompts.
        folder: Keeps the search, so that a restart goes on with it.
        budget: Trials, as many as the peers have settings.
        progress: Called after every trial.
    """
    space = Space(recorded.profile, handoff=False, trajectories=recorded.trajectories)
    trials = searched(
        settings_of(evaluator, recorded.profile, space),
        space,
        evaluator,
        cases,
        str(folder / _SEARCHES),
        lambda search: search.run(budget, progress),
    )
    found = candidates(trials, budget.trials, space.pace(trials))
    return [setting_of(trial.policy) for trial in found]


def setting_of(policy: Policy) -> Setting:
    """Return a policy of ours as one of the settings that are compared."""
    return Setting(policy.id[7:19], partial(_on, policy=policy), policy)


@contextmanager
def _on(pipe: Any, policy: Policy) -> Iterator[Mapping[str, Any]]:
    with accelerate(pipe, policy):
        yield {}
