"""Only the first axis of a grid may be longer than 65,535; nothing is launched here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch

from peft_pte_kernels.ops import attention, cache, encode, logprobs, low_rank, state

LIMIT = 65535
MODULES = (attention, cache, encode, logprobs, low_rank, state)
LAYERS, ROWS, HEADS, RANK = 36, 2048, 8, 4


def one(*shape: int) -> torch.Tensor:
    """Any shape in the memory of one element; the last size is one, so that nothing has to be copied."""
    return torch.zeros(1).expand(shape)


def encode_many_rows() -> None:
    keys, values = ([one(ROWS, HEADS, 70, 1)] * LAYERS for _ in range(2))
    weights, taps = [torch.zeros(RANK, HEADS)] * LAYERS, [torch.zeros(1, RANK)] * LAYERS
    cores = one(LAYERS, ROWS, RANK + 1, RANK)
    call = (keys, values, weights, weights, cores, True, None, None, False, None, taps)
    encode.encode_cores(*call)
    encode.encode_cores_backward(cores, *call, needs_inputs=False)


def read_many_rows() -> None:
    cores, query = one(LAYERS, ROWS, RANK, RANK), one(LAYERS, RANK, RANK)
    state.read_states(cores, query, query[:, None], True, "row")
    state.read_states_backward(cores, cores, query, query[:, None], True, "row")


def attend_with_many_heads() -> None:
    query, keys = one(ROWS, 8 * HEADS, 1, 1), one(ROWS, HEADS, 300, 1)
    with patch.object(attention, "TARGET_PROGRAMS", 2 * ROWS * HEADS):  # several splits, to be combined
        attention.decode_attention(query, keys, keys, one(ROWS), one(1), 1.0)


def compact_many_heads() -> None:
    cache.compact([one(ROWS, 64, 10, 1)] * 2 * LAYERS, 1, 2, 9)


def update_many_tokens() -> None:
    for rows, tokens in ((2**17, 1), (1, 2**17)):
        x, bases, A, B = one(rows, tokens, 2), [one(rows, tokens, 2)], [one(2, RANK)], [one(RANK, 2)]
        *outputs, z = low_rank.low_rank(x, bases, torch.zeros(rows, RANK, RANK), A, B, 1.0)
        low_rank.low_rank_backward(outputs, x, z, torch.zeros(rows, RANK, RANK), A, B, 1.0, False)


def many_logits() -> None:
    logits, targets = one(2**17, 3), torch.zeros(2**17, dtype=torch.int64)
    logprob, _, normalizer = logprobs.logprobs(logits, targets, 1.0)
    logprobs.logprobs_backward(logprob, logits, targets, normalizer, 1.0)


@pytest.mark.parametrize(
    "run",
    [encode_many_rows, read_many_rows, attend_with_many_heads, compact_many_heads, update_many_tokens, many_logits],
)
def test_long_axes_come_first(run: Callable[[], None]) -> None:
    grids: list[tuple[str, tuple[int, ...]]] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids.append((kernel.fn.__name__, grid))

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "launch", note))
        run()
    assert any(size > LIMIT for _, grid in grids for size in grid)
    assert not [item for item in grids if any(size > LIMIT for size in item[1][1:])]
