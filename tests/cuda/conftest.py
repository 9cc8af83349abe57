"""What needs a GPU: skipped, with that reason, where there is none."""

from pathlib import Path

import pytest

from skinfast.testing import devices

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if "cuda" in devices():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU and a build with CUDA kernels"))
