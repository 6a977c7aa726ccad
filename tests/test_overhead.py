"""Bounds on what PTE dispatches beside its arithmetic; what benchmarks/overhead.py counts, on fewer layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture
def overhead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import overhead

    return overhead


def test_what_is_counted(overhead) -> None:
    x = torch.ones(3, 3)
    assert overhead.counted(lambda: x.mT[1:].reshape(-1)) == 1  # a copy, after two views
    assert overhead.counted(lambda: (x @ x + x).sum()) == 3


def test_replayed_steps(overhead) -> None:
    """Beside the graph next to nothing is launched, for any number of layers."""
    whole, padded = (overhead.operations_of_a_replayed_step(3, padded) for padded in (False, True))
    assert whole <= 8 and padded <= 21
    assert overhead.operations_of_a_replayed_step(6, False) == whole


def test_evictions(overhead) -> None:
    few, many = (overhead.operations_of_an_eviction(layers) for layers in (2, 6))
    assert 0 < many - few <= 52 * 4


def test_training_segments(overhead) -> None:
    few, many = (overhead.operations_of_a_segment(layers) for layers in (2, 4))
    assert 0 < many[0] - few[0] <= 105 * 2
    assert 0 < many[1] - few[1] <= 235 * 2
