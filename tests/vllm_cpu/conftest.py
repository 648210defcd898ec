"""These tests need an environment with vLLM, in VLLM_VENV: `make test-vllm` builds it. Without it nothing here is collected."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("VLLM_VENV") else ["test_*.py"]
