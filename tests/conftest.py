"""What every test starts from."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def no_tables(tmp_path_factory):
    """What this user has tuned must not change what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEXAONE_CACHE_DIR", str(tmp_path_factory.mktemp("tables")))
        yield


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """An object that Inductor builds switches them off for the process that loads it.

    GCC before 13 links what is compiled with -ffast-math so; a test before this one may have loaded
    one, and results that are compared bit for bit with those of another process would differ.
    """
    torch.set_flush_denormal(False)
