from __future__ import annotations

import pytest

from ditune.db.errors import UsageFault
from ditune.miniature.language import COLOUR_NAMES, DIGITS, MOTIONS, captions, parse, subjects


def test_captions_name_every_subject_once() -> None:
    found = captions("calibration") + captions("held-out")
    assert len(DIGITS) * len(COLOUR_NAMES) * len(MOTIONS) == len(set(found)) == len(found)


def test_splits_are_disjoint_and_fixed() -> None:
    assert not set(captions("calibration")) & set(captions("held-out"))
    assert captions("held-out") == captions("held-out")
    assert {word for c in captions("held-out")[:60] for word in c.split()} >= {*COLOUR_NAMES}


def test_captions_are_parsed_back() -> None:
    assert subjects() == [parse(subject.caption) for subject in subjects()]


@pytest.mark.parametrize("caption", ["", "a red 3", "a pink 3 moving left", "the red 3 growing"])
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(UsageFault, match="a red 3 moving left"):
        parse(caption)


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UsageFault, match="held-out"):
        captions("test")  # type: ignore[arg-type]
