"""How many cases a fuzz test runs."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

default = settings.default.max_examples if settings.default is not None else 100
fuzz = settings(max_examples=max(300, default), deadline=None, suppress_health_check=list(HealthCheck))
"""300 cases, or what the chosen profile says where that is more (tests/fuzz/conftest.py)."""
