"""Tests under vLLM, in an environment of their own: `make test-vllm`. A run of all tests leaves this folder out.

The folder is not called `vllm`: it would look like that package to those who look whether it is installed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Read when vLLM is imported. One process, so that a test sees the engine; errors are asserted where they matter.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    folder = config.invocation_params.dir
    asked = any((folder / argument.split("::")[0]).resolve().is_relative_to(HERE) for argument in config.args)
    return None if asked else True
