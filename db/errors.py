"""Every error that ditune raises on purpose; each says what was asked, what was found, what to do.

DituneError               exit code 1: failed in mid-run, state kept
|- UsageFault             exit code 2: what the caller must correct
|- NoFeasiblePolicy       exit code 4: the search found nothing that holds the floors
|- NotMeasurable          exit code 5: the environment cannot be measured
|- CorruptData            exit code 6: a damaged or incompatible policy file or database
|- EvaluationFault        exit code 1: the machine failed while a policy was evaluated
`- StoreFault             exit code 1: the database could not be written; earlier state is intact
   `- StoreLost           the server went away; what was asked of it may be asked again
"""

from __future__ import annotations

from typing import ClassVar


class DituneError(Exception):
    """The root of the tree; its message is one sentence or two that a user can act on."""

    exit_code: ClassVar[int] = 1


class UsageFault(DituneError):
    """Something the caller must correct: an argument, a path, a name, an unsuitable model."""

    exit_code = 2


class NoFeasiblePolicy(DituneError):
    """No policy holds the floors; a result of a search, not a defect of it."""

    exit_code = 4


class NotMeasurable(DituneError):
    """Timings taken here would mean nothing: throttling, foreign processes."""

    exit_code = 5


class CorruptData(DituneError):
    """A policy file or database is damaged, or was written by an incompatible version."""

    exit_code = 6


class StoreFault(DituneError):
    """The database could not be read or written; what was committed before is intact."""


class StoreLost(StoreFault):
    """The database server cannot be reached at the moment; it may come back."""


class EvaluationFault(DituneError):
    """The process or device that evaluated a policy failed; the policy may be tried again."""
