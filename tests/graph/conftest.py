"""Fresh compiler state, poisoned outputs, few threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

from ..kernels.conftest import poisoned_memory, register_profile  # noqa: F401  (a fixture)

register_profile("graph", 25)


@pytest.fixture(autouse=True)
def fresh_compiler():
    settings.load_profile("graph")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
