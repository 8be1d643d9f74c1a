"""What every test starts from."""

import pytest
import torch

from kexaone.cpu.activation import checking
from kexaone.kernels import dispatch, launch


@pytest.fixture(autouse=True, scope="session")
def no_tables(tmp_path_factory):
    """What this user has tuned must not change what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEXAONE_CACHE_DIR", str(tmp_path_factory.mktemp("tables")))
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that leaves an override or a flag on would change the bits of all that follow."""
    before = _flags()
    yield
    assert _flags() == before


def _flags():
    return (
        dispatch._scope.override,
        checking(),
        launch._allocate,
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        # subnormal numbers become zero where something switched them off
        bool(torch.tensor([1e-39]) * 1.0),
    )
