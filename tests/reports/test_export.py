"""What other programs read, read by those programs."""

from __future__ import annotations

import io
from collections.abc import Callable

import pandas as pd
from junitparser import JUnitXml

from ditune.reports.content import ReportContent
from ditune.reports.export import junit_xml, trials_csv


def test_trials_become_a_table(content: ReportContent) -> None:
    table = pd.read_csv(io.StringIO(trials_csv(content.trials)))
    assert len(content.trials) == len(table)
    assert [t.number for t in content.trials] == list(table["trial"])
    assert [t.policy.id for t in content.trials] == list(table["policy_id"])
    first = content.trials[0]
    for name, quality in first.quality.items():
        assert quality.worst == table[f"{name}.worst"][0]


def test_a_study_without_trials_is_an_empty_table() -> None:
    assert trials_csv([]).strip() == ""


def test_floors_become_tests(content: ReportContent) -> None:
    assert content.chosen is not None
    evidence = content.chosen.evidence
    suite = next(iter(JUnitXml.fromstring(junit_xml("study", evidence, "").encode())))
    assert 1 + len(evidence.quality) == suite.tests
    missed = evidence.model_copy(
        update={
            "quality": {
                name: quality.model_copy(update={"floor": 99.0})
                for name, quality in evidence.quality.items()
            }
        }
    )
    suite = next(iter(JUnitXml.fromstring(junit_xml("study", missed, "").encode())))
    assert len(missed.quality) == suite.failures


def test_no_policy_is_one_failure_that_says_how_close_it_came(
    build: Callable[..., ReportContent],
) -> None:
    text = junit_xml("study", None, 'closest was trial 3: "1.2x" <b>')
    suite = next(iter(JUnitXml.fromstring(text.encode())))
    assert (suite.tests, suite.failures) == (1, 1)
    (case,) = suite
    assert "<b>" in case.result[0].message
