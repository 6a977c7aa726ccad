"""Tests that need libraries which the main suite does without. A run of all tests leaves this folder out.

They are collected when it is asked for by name, `python -m pytest tests/optional`, and skip where a library is missing.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    folder = config.invocation_params.dir
    asked = any((folder / argument.split("::")[0]).resolve().is_relative_to(HERE) for argument in config.args)
    return None if asked else True
