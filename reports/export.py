"""Records for other programs: trials as a table for a notebook, floors as tests for a CI page."""

from __future__ import annotations

import io
from collections.abc import Iterable

import pandas as pd
from junitparser import Failure, JUnitXml, TestCase, TestSuite

from ditune.db.policy import Handoff, RuleCache
from ditune.db.records import Evidence, Trial
from ditune.reports.words import visible


def trials_csv(trials: Iterable[Trial]) -> str:
    """Return one line per trial: how it was found, speedup, work ratio, quality, why it ended.

    Quality has a mean and a worst column per constraint. Text that a spreadsheet would run as a
    formula does not occur: every column is a number or a word of ours, but for the reason, which
    begins with the name of a constraint.
    """
    text: str = pd.DataFrame([_row(trial) for trial in trials]).to_csv(index=False)
    return text


def _row(trial: Trial) -> dict[str, object]:
    cache, handoff = trial.policy.cache, trial.policy.handoff
    kind = "none" if cache is None else "rule" if isinstance(cache, RuleCache) else "mask"
    row: dict[str, object] = {
        "trial": trial.number,
        "source": trial.source,
        "state": trial.state,
        "feasible": trial.feasible,
        "cache": kind,
        "handoff": handoff.mode if handoff is not None else "none",
        "handoff_sigma": handoff.sigma if isinstance(handoff, Handoff) else None,
        "speedup": trial.speedup,
        "pairs": trial.pairs,
        "work_ratio": trial.work_ratio,
    }
    for name, quality in trial.quality.items():
        row |= {f"{name}.mean": quality.mean, f"{name}.worst": quality.worst}
    return row | {
        "reason": trial.reason,
        "duration_s": trial.duration_s,
        "policy_id": trial.policy.id,
    }


def junit_xml(study: str, evidence: Evidence | None, best_seen: str) -> str:
    """Return a confirmation as a JUnit suite: one test per floor, and one for the speedup.

    Args:
        study: The suite's name.
        evidence: What was proved; None when no policy held the floors.
        best_seen: How close the search came, for the failure that then stands alone.
    """
    suite = TestSuite(f"ditune {study}")
    if evidence is None:
        suite.add_testcase(_case("a policy holds every floor", visible(best_seen)))
    else:
        low = evidence.speedup.ci95[0]
        said = f"the interval of the speedup begins at {low:.3f}" if low <= 1.0 else ""
        suite.add_testcase(_case("faster than the plain pipeline", said))
        for name, quality in evidence.quality.items():
            if quality.floor is None:  # reported, not bounded
                continue
            value = quality.worst if name.endswith("_worst") else quality.mean
            said = f"{value:.4g} is below {quality.floor:g}" if value < quality.floor else ""
            suite.add_testcase(_case(f"{name} >= {quality.floor:g}", said))
    page = JUnitXml()
    page.add_testsuite(suite)
    held = io.BytesIO()
    page.write(held)
    return held.getvalue().decode("utf-8")


def _case(name: str, failure: str) -> TestCase:
    case = TestCase(name, classname="ditune.confirmation")
    if failure:
        case.result = [Failure(failure)]
    return case
