"""pytest -p emulated_plugin: a room's own tests, their ops on the emulated CUDA kernels."""

import emulated
import pytest
import torch

from skinfast import testing

CALLS: dict[str, int] = {}
GPU_DTYPES = testing.dtypes("cuda")


def pytest_collection_modifyitems(items):
    refused = pytest.mark.skip(reason="what a CPU refuses, the emulated kernels take")
    for item in items:
        if "float16; on the CPU it needs" in str(getattr(item, "callspec", None)):
            item.add_marker(refused)


def pytest_configure():
    # As on a GPU. The tests import the function by name, after this.
    testing.dtypes = lambda device: GPU_DTYPES
    torch.ops.load_library(emulated.build_ops())


@pytest.fixture(autouse=True)
def _on_emulated_kernels():
    with emulated.Emulated() as mode:
        yield
    for name, count in mode.calls.items():
        CALLS[name] = CALLS.get(name, 0) + count


def pytest_terminal_summary(terminalreporter):
    for name, count in CALLS.items():
        terminalreporter.write_line(f"emulated {name}: {count} calls")
