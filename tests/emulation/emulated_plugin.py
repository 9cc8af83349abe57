"""pytest -p emulated_plugin: a room's own tests, their ops on the emulated CUDA kernels."""

import emulated
import pytest
import torch

CALLS: dict[str, int] = {}


def pytest_configure():
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
