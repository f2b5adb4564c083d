"""The first stage of a session: the profile, which the search rests on, and what errors do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ditune.db.records import Impacts
from ditune.db.store import Store
from ditune.profiler.impact import impacts
from ditune.profiler.parts import forwards_of
from ditune.profiler.record import Recorded, record
from ditune.tuner.evaluate import Case, Evaluator
from ditune.tuner.goals import SEARCH_SEED
from ditune.tuner.progress import Progress


def profiled(
    evaluator: Evaluator, store: Store, prompts: int, cases: Sequence[Case], progress: Progress
) -> Recorded:
    """Profile a source and keep the profile; impacts that are known are not measured again.

    Args:
        evaluator: Of the source; it counts the work, and takes over the plain videos.
        store: Keeps the profile.
        prompts: How many of the calibration prompts to run.
        cases: What the search will measure each policy on.
        progress: Shows what happens.
    """
    source = evaluator.source
    total = 2 * prompts + 3
    done = -1

    def note(words: str) -> None:
        nonlocal done
        done += 1
        progress.update("profile", done, total, words)

    recorded = record(
        source.pipe,
        source.calibration[:prompts],
        call={**source.call, "output_type": "np"},
        small=source.small,
        seed=SEARCH_SEED,
        progress=note,
    )
    for case, output in zip(cases, recorded.outputs, strict=False):
        evaluator.adopt(case, output)  # the same prompts and seeds
    evaluator.videos += recorded.videos
    known = store.impacts(recorded.profile.workload)
    if known is None:
        note("measuring what errors do")
        known = _impacts(evaluator, forwards_of(recorded.profile))
    found = recorded.profile.model_copy(update={"impacts": known})
    progress.update("profile", total, total, "done")
    store.save_profile(found)
    return replace(recorded, profile=found)


def _impacts(evaluator: Evaluator, forwards_per_video: int) -> Impacts | None:
    def count(forwards: int) -> None:
        evaluator.videos += forwards / forwards_per_video

    source = evaluator.source
    prompt, call = source.calibration[0], source.call
    return impacts(source.pipe, prompt, call=call, seed=SEARCH_SEED, spent=count)
