"""The emulated ops, built once a session."""

import emulated
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _compiler():
    if emulated.compiler() is None:
        pytest.skip("the emulation of CUDA needs g++")


@pytest.fixture(scope="session")
def emulated_ops(_compiler):
    torch.ops.load_library(emulated.build_ops())


@pytest.fixture(autouse=True)
def _one_thread():
    """The emulation has one; PyTorch's others would spin beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
