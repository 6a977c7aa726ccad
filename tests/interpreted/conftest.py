"""Triton kernels in Triton's interpreter, on CPU tensors. In a process of its own, since Triton decides at import:

    TRITON_INTERPRET=1 PTE_KERNELS=triton python -m pytest tests/interpreted

A run of all tests leaves this folder out and says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from numerics import poisoned

HERE = Path(__file__).parent
VARIABLES = {"TRITON_INTERPRET": "1", "PTE_KERNELS": "triton"}
READY = all(os.environ.get(name) == value for name, value in VARIABLES.items())
COMMAND = f"{' '.join(f'{name}={value}' for name, value in VARIABLES.items())} python -m pytest tests/interpreted"

if READY:
    import bfloat16
    import races

    bfloat16.install()
    races.install(os.environ.get("PROGRAM_ORDER", "random"))
    torch.set_num_threads(1)
    # As tests/conftest.py, whose profile is loaded before; a launch takes milliseconds, so fewer examples.
    settings.register_profile(
        "interpreted",
        deadline=None,
        derandomize=True,
        max_examples=50,
        phases=[Phase.explicit, Phase.generate],  # shrinking would take many minutes
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    settings.load_profile("interpreted")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse when this folder is asked for by name and the variables are missing."""
    folder = config.invocation_params.dir
    asked = any((folder / argument.split("::")[0]).resolve().is_relative_to(HERE) for argument in config.args)
    if asked and not READY:
        raise pytest.UsageError(f"tests/interpreted needs Triton's interpreter. Run: {COMMAND}")


def pytest_ignore_collect() -> bool | None:
    return None if READY else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not READY:
        terminalreporter.write_line(f"tests/interpreted is run on its own: {COMMAND}")


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that kernels get is full of NaN during the test."""
    with poisoned():
        yield
