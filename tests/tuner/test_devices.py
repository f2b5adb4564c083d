from __future__ import annotations

import pytest

from ditune.db.errors import NotMeasurable
from ditune.tuner.devices import refuse_foreign, require_alone


def test_programs_of_others_are_named() -> None:
    refuse_foreign("GPU-1", set())
    with pytest.raises(NotMeasurable, match=r"compute on GPU-1 \(pid 7, 12\)"):
        refuse_foreign("GPU-1", {12, 7})


def test_where_nothing_can_be_known_nothing_is_refused() -> None:
    require_alone("host/cpu")
    require_alone("GPU-00000000-0000-0000-0000-000000000000")  # no driver, or no such device
