"""Fresh compiler state, poisoned outputs, few threads."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from ..kernels.conftest import poisoned_memory  # noqa: F401  (a fixture)

settings.register_profile(
    "graph",
    max_examples=25,
    deadline=None,
    print_blob=True,
    derandomize="CI" in os.environ,
    database=None if "CI" in os.environ else settings().database,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    settings.load_profile("graph")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
