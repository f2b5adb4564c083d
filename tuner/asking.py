"""Optuna's half of a search: which point to try next, and what a point gave; only here it is asked.

Every answer that is on its way carries the uuid of its trial in our database. So a process that
starts anew can tell what is still to come, what came and was not told, and what was lost.
"""

from __future__ import annotations

from collections import deque
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

    def __init__(self, name: str, storage_url: str, sampler: optuna.samplers.BaseSampler) -> None:
        """Create or load a study.

        Args:
            name: Of the study.
            storage_url: See `ditune.db.engine.study_storage_url`.
            sampler: Proposes points.
        """
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
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            # whether nothing was ever asked
            self.is_new = not self.study.get_trials(deepcopy=False)
        # nobody else asks: what was enqueued and not asked for yet need not be read each time
        self._waiting = deque(str(trial.user_attrs["source"]) for trial in waiting)
        self._taken_up: set[int] = set()  # points that an earlier process asked for

    def close(self) -> None:
        """Let go of the storage's connections."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def enqueue(self, parameters: Mapping[str, Any], source: str) -> None:
        """Let a point be the next one, or the next after those that wait already."""
        with self._faults():
            self.study.enqueue_trial(dict(parameters), user_attrs={"source": source})
        self._waiting.append(source)
        self.is_new = False

    def has_waiting(self) -> bool:
        """Whether a point was enqueued and not asked for yet."""
        return bool(self._waiting)

    def ask(
        self, distributions: dict[str, BaseDistribution], sampler: optuna.samplers.BaseSampler
    ) -> tuple[optuna.Trial, str]:
        """Return the next point and where it comes from: the sampler, or who enqueued it."""
        with self._faults():
            self.study.sampler = sampler
            asked = self.study.ask(distributions)
        return asked, self._waiting.popleft() if self._waiting else "search"

    def mark(self, asked: optuna.Trial, uuid: str) -> None:
        """Note which trial of ours will answer."""
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
