"""Every test of this folder that is not slow is marked `benchmarks`: `make test-benchmarks` runs them."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents and not item.get_closest_marker("slow"):
            item.add_marker("benchmarks")
