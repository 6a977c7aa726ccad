"""What the tests of replayed decoding steps share."""

from __future__ import annotations

import copy

import pytest
from models import tiny_model, with_adapter
from replays import Replaying


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    return Replaying(monkeypatch, recorded=True)


@pytest.fixture(scope="module")
def one_model():
    return with_adapter(tiny_model("qwen2"), window_size=8)


@pytest.fixture
def model(one_model):
    return copy.deepcopy(one_model)  # without the steps of other tests
