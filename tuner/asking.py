"""Optuna's half of a search: which point to try next, and what a point gave; only here it is asked.

Every answer that is on its way carries the uuid of its trial in our database. So a process that
starts anew can tell what is still to come, what came and was not told, and what was lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from ditune.db.engine import faults, parse_url, shown
from ditune.db.records import Trial

_UUID = "uuid"


class Asking:
    """One Optuna study; a single process may ask it at a time."""

    def __init__(
        self, name: str, storage_url: str, sampler: optuna.samplers.BaseSampler, seed: int = 0
    ) -> None:
        """Create or load a study.

        Args:
            name: Of the study.
            storage_url: See `ditune.db.engine.study_storage_url`.
            sampler: Proposes points.
            seed: Of random points.
        """
        self._chance = optuna.samplers.RandomSampler(seed=seed)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = parse_url(storage_url)
        self._where = shown(url)
        # a server may have been restarted since a connection was last used
        checks = {"pool_pre_ping": True} if url.get_backend_name() != "sqlite" else {}
        with self._faults():
            self._storage = optuna.storages.RDBStorage(storage_url, engine_kwargs=checks)
            self.study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                sampler=sampler,
                direction="minimize",
                load_if_exists=True,
            )
            self._id = self._storage.get_study_id_from_name(name)
        self._taken_up: set[int] = set()  # points that an earlier process asked for

    def close(self) -> None:
        """Let go of the storage's connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def place(
        self,
        parameters: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        source: str,
        uuid: str,
    ) -> optuna.Trial:
        """Ask for a point of our own choice, in a single write with all that is known of it.

        Args:
            parameters: The point.
            distributions: The space that it lies in.
            source: Who proposed it.
            uuid: Of the trial of ours that will answer.
        """
        point = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(parameters),
            distributions=dict(distributions),
            user_attrs={"source": source, _UUID: uuid},
        )
        with self._faults():
            number = self._storage.create_new_trial(self._id, template_trial=point)
            return optuna.Trial(self.study, number)

    def by_chance(self, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any]:
        """Return a random point, of which Optuna need not know."""
        blank = optuna.trial.create_trial(state=TrialState.RUNNING)
        return {
            name: self._chance.sample_independent(self.study, blank, name, distribution)
            for name, distribution in distributions.items()
        }

    def ask(self, distributions: dict[str, BaseDistribution]) -> tuple[optuna.Trial, str]:
        """Return the sampler's next point and its source; one that was enqueued goes first."""
        with self._faults():
            asked = self.study.ask(distributions)
            return asked, asked.user_attrs.get("source", "search")

    def mark(self, asked: optuna.Trial, uuid: str) -> None:
        """Note which trial of ours will answer a point that the sampler proposed."""
        with self._faults():
            asked.set_user_attr(_UUID, uuid)

    def running(self) -> Iterator[tuple[str | None, optuna.Trial]]:
        """Yield what was asked and not told, with the uuid of the trial that will answer, if any.

        They are the same objects as `ask` gives: only those take constraints.
        """
        with self._faults():
            found = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            asked = [optuna.Trial(self.study, trial._trial_id) for trial in found]
        self._taken_up |= {each.number for each in asked}
        for each in asked:
            yield each.user_attrs.get(_UUID), each

    def tell(self, asked: optuna.Trial, trial: Trial, value: float) -> None:
        """Tell what a trial gave; all its constraints go with it, since none would mean feasible.

        A process may have died after it set some of them: those stay as they are, because they come
        from the same trial.
        """
        with self._faults():
            known = asked.constraints if asked.number in self._taken_up else {}
            for name, violation in trial.violation.items():
                if name not in known:
                    asked.set_constraint(name, violation)
            self.study.tell(asked, value)

    def give_up(self, asked: optuna.Trial) -> None:
        """Tell that a point will never be answered: a fault of the machine, not of the point."""
        with self._faults():
            self.study.tell(asked, state=TrialState.FAIL)

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Say in our words what goes wrong with Optuna's storage, which wraps some of it."""
        with faults(self._where):
            try:
                yield
            except optuna.exceptions.StorageInternalError as error:
                raise error.__cause__ or error from None
