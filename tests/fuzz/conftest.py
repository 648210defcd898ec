"""Fuzzing. In the default run 300 cases of each kind; `pytest tests/fuzz --hypothesis-profile fuzz` makes it 10 000."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if settings.default is not None and settings.default.max_examples >= 10_000:
        for item in items:
            if item.path.parent.name == "fuzz":
                item.add_marker(pytest.mark.timeout(1800))
