"""The switch that makes everything run as if ditune were not there, read at every call."""

from __future__ import annotations

import os

DISABLE_VARIABLE = "DITUNE_DISABLE"


def disabled() -> bool:
    """Whether `DITUNE_DISABLE=1` is set."""
    return os.environ.get(DISABLE_VARIABLE) == "1"
