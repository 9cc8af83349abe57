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
