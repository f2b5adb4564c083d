"""A study from its settings: what names a search, and a search that is kept in one database."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing

from ditune.db.engine import study_storage_url
from ditune.db.record import now
from ditune.db.records import Profile, Settings, Study, Trial
from ditune.db.store import Store
from ditune.tuner.evaluate import Case, Evaluates, Evaluator
from ditune.tuner.search import Search
from ditune.tuner.source import prompts_digest
from ditune.tuner.space import Space


def settings_of(evaluator: Evaluator, profile: Profile, space: Space, seed: int = 0) -> Settings:
    """Return what names a search: two searches with the same settings are the same study."""
    return Settings(
        hardware=profile.hardware,
        software=profile.software,
        workload=profile.workload,
        constraints=evaluator.constraints,
        prompts_digest=prompts_digest(evaluator.source),
        seed=seed,
        space=space.digest,
    )


def searched(
    settings: Settings,
    space: Space,
    evaluator: Evaluates,
    cases: Sequence[Case],
    url: str,
    run: Callable[[Search], list[Trial]],
) -> list[Trial]:
    """Run a search that a database keeps, so that another run goes on with it.

    Args:
        settings: See `settings_of`.
        space: What may be searched.
        evaluator: Of the source, with the floors.
        cases: The calibration prompts.
        url: The database.
        run: What to do with the search, once it is open; usually to run it for some budget.
    """
    with Store.open(url) as store:
        if settings.study not in {study.name for study in store.studies()}:
            store.save_study(Study(name=settings.study, settings=settings, created_at=now()))
        search = Search(settings.study, space, evaluator, cases, seed=settings.seed)
        search.open(study_storage_url(url), store)
        with closing(search):
            return run(search)
