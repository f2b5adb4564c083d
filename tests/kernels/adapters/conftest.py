"""Tiny models with experts, one after the other."""

from __future__ import annotations

import pytest
from tests.kernels.adapters.models import MODELS, Model


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]
