"""Arguments of `peft_pte_kernels` that do not fit together are refused, by name and value, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import peft_pte_kernels
from peft_pte_kernels import Rotation

L, B, H, M, D, R, T, OUT = 2, 3, 2, 5, 16, 4, 6, 8


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def encode(**changed: Any) -> None:
    keys, values = ([zeros(B, H, M, D) for _ in range(L)] for _ in range(2))
    weights = [zeros(R, H * D) for _ in range(L)]
    arguments = dict(keys=keys, values=values, key_weights=weights, value_weights=weights, cores=zeros(L, B, R, R))
    peft_pte_kernels.encode(**(arguments | dict(update="delta") | changed))


def read_state(**changed: Any) -> None:
    arguments = dict(cores=zeros(L, B, R, R), query=zeros(L, R, R), initial=zeros(L, 1, R, R))
    peft_pte_kernels.read_state(**(arguments | dict(transposed=False, norm="none") | changed))


def compact(**changed: Any) -> None:
    peft_pte_kernels.compact(**(dict(slots=[zeros(B, H, 10, D)], start=2, count=3, length=9) | changed))


def low_rank_update(**changed: Any) -> None:
    arguments = dict(x=zeros(B, T, D), bases=[zeros(B, T, OUT)] * 2, state=zeros(B, R, R), scaling=1.0)
    peft_pte_kernels.low_rank_update(**(arguments | dict(A=[zeros(OUT, R)] * 2, B=[zeros(R, D)] * 2) | changed))


def decode_attention(**changed: Any) -> None:
    arguments = dict(query=zeros(B, 2 * H, 1, D), keys=zeros(B, H, 10, D), values=zeros(B, H, 10, D), scaling=1.0)
    where = dict(first=torch.zeros(B, dtype=torch.int32), length=torch.full((1,), 9, dtype=torch.int32))
    peft_pte_kernels.decode_attention(**(arguments | where | changed))


def token_logprobs(**changed: Any) -> None:
    arguments = dict(logits=zeros(B, T, 11), targets=torch.zeros(B, T, dtype=torch.int64), temperature=1.0)
    peft_pte_kernels.token_logprobs(**(arguments | changed))


FUNCTIONS = [encode, read_state, compact, low_rank_update, decode_attention, token_logprobs]
INTEGERS = torch.zeros(B, dtype=torch.int32)
CASES: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (encode, dict(update="product"), "`update` is 'product', but must be one of 'sum', 'delta'."),
    (encode, dict(cores=zeros(B, R, R)), "`cores` is of shape (3, 4, 4), but must be [L, B, r + c - 1, r]."),
    (
        encode,
        dict(values=[zeros(B, H, M, D)]),
        "`values` is a list of 1, but must be one tensor for each layer, here 2",
    ),
    (encode, dict(keys=[zeros(B, H, M, D), zeros(B, H, M + 1, D)]), "`keys[1]` is of shape (3, 2, 6, 16)"),
    (
        encode,
        dict(key_weights=[zeros(R, D)] * L),
        "`key_weights[0]` is of shape (4, 16), but must be [r, H D], here (4, 32)",
    ),
    (encode, dict(valid=torch.ones(2, M, dtype=torch.bool)), "`valid` is of shape (2, 5), but must be [B or 1, m]"),
    (encode, dict(valid=torch.ones(B, M)), "`valid` is torch.float32, but must be torch.bool"),
    (encode, dict(rotation=Rotation(zeros(2, M, 8), zeros(2, M, 8), False)), "`rotation.cos` is of shape (2, 5, 8)"),
    (encode, dict(rotation=Rotation(zeros(B, M, 9), zeros(B, M, 9), False)), "`rotation.cos` is of shape (3, 5, 9)"),
    (encode, dict(rotation=Rotation(zeros(B, M, 8), zeros(1, M, 8), False)), "`rotation.sin` is of shape (1, 5, 8)"),
    (
        encode,
        dict(cores=zeros(L, B, R + 2, R)),
        "`cores` is of shape (2, 3, 6, 4), but must be [L, B, r, r] without taps",
    ),
    (encode, dict(cores=zeros(L, B, R - 1, R)), "`cores` is of shape (2, 3, 3, 4), but must be [L, B, r, r]"),
    (
        encode,
        dict(cores=zeros(L, B, R - 1, R), taps=[zeros(1, R)] * L),
        "`cores` is of shape (2, 3, 3, 4), but must be [L, B, r + c - 1, r]",
    ),
    (
        encode,
        dict(taps=[zeros(2, R)] * L),
        "`taps` is a list of 2, but must be None for cores that carry no keys, here (2, 3, 4, 4)",
    ),
    (
        encode,
        dict(taps=[zeros(1, R)] * L, update="sum"),
        "`taps[0]` is of shape (1, 4), but must be [c - 1, r]: update='sum' has no gate",
    ),
    (
        encode,
        dict(cores=zeros(L, B, R + 1, R), taps=[zeros(1, R)]),
        "`taps` is a list of 1, but must be one tensor for each layer, here 2",
    ),
    (
        encode,
        dict(cores=zeros(L, B, R + 2, R), taps=[zeros(2, R), zeros(1, R)]),
        "`taps[1]` is of shape (1, 4), but must be [c - 1, r] for cores of [L, B, r + c - 1, r], with a gate [c, r]",
    ),
    (
        encode,
        dict(cores=zeros(L, B, R + 1, R), taps=[zeros(1, R).to("meta")] * L),
        "`taps[0]` is on meta, but must be on cpu",
    ),
    (encode, dict(cores=zeros(L, B, R, R).to("meta")), "`keys[0]` is on cpu, but must be on meta"),
    (read_state, dict(query=zeros(R, R)), "`query` is of shape (4, 4), but must be [L, r, r], here (2, 4, 4)"),
    (read_state, dict(initial=zeros(L, 2, R, R)), "`initial` is of shape (2, 2, 4, 4)"),
    (read_state, dict(norm="layer"), "`norm` is 'layer', but must be one of 'none', 'bound', 'row', 'frobenius'"),
    (compact, dict(slots=[zeros(B, 10, D)]), "`slots[0]` is of shape (3, 10, 16), but must be [B, H, capacity, D]"),
    (compact, dict(slots=[zeros(B, H, D, 10).mT]), "`slots[0]` is of strides (320, 160, 1, 10)"),
    (compact, dict(length=11), "`length` is 11, but must be at most the 10 slots of slots[0]"),
    (compact, dict(count=8), "`start, count, length` is start = 2, count = 8, length = 9"),
    (low_rank_update, dict(bases=[]), "`bases` is a list of 0, but must be one tensor for each of one to three"),
    (
        low_rank_update,
        dict(state=zeros(1, R, R)),
        "`state` is of shape (1, 4, 4), but must be [B, r, r], here (3, 4, 4)",
    ),
    (
        low_rank_update,
        dict(A=[zeros(OUT, R)]),
        "`A` is a list of 1, but must be one tensor for each projection, here 2",
    ),
    (low_rank_update, dict(B=[zeros(D, R)] * 2), "`bases, A, B` is of shapes (3, 6, 8), (8, 4), (16, 4)"),
    (low_rank_update, dict(gate=zeros(R, D)), "`gate` is given with 2 projections, but must be None, or that of a"),
    (
        low_rank_update,
        dict(bases=[zeros(B, T, OUT)], A=[zeros(OUT, R)], B=[zeros(R, D)], gate=zeros(R, OUT)),
        "`gate` is of shape (4, 8), but must be [r, in], here (4, 16)",
    ),
    (decode_attention, dict(first=INTEGERS[:1]), "`first` is of shape (1,), but must be [B], here (3,)."),
    (decode_attention, dict(first=zeros(B)), "`first` is torch.float32, but must be of integers"),
    (decode_attention, dict(first=INTEGERS.to("meta")), "`first` is on meta, but must be on cpu"),
    (decode_attention, dict(length=INTEGERS), "`length` is of shape (3,), but must be [1], here (1,)."),
    (
        decode_attention,
        dict(query=zeros(B, 3, 1, D)),
        "`query` is of 3 heads, but must be of a multiple of the 2 heads",
    ),
    (decode_attention, dict(query=zeros(B, 4, 2, D)), "`query` is of shape (3, 4, 2, 16), but must be [B, H_q, 1, D]"),
    (decode_attention, dict(values=zeros(B, H, 9, D)), "`values` is of shape (3, 2, 9, 16)"),
    (token_logprobs, dict(targets=torch.zeros(B, 1, dtype=torch.int64)), "`targets` is of shape (3, 1), but must be"),
    (token_logprobs, dict(targets=zeros(B, T)), "`targets` is torch.float32, but must be of integers"),
    (token_logprobs, dict(temperature=0.0), "`temperature` is 0.0, but must be larger than zero"),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_fits_is_taken(function: Callable[..., None]) -> None:
    function()


@pytest.mark.parametrize("function, changed, message", CASES, ids=[f"{f.__name__}-{m}" for f, _, m in CASES])
def test_what_does_not_fit_is_refused(function: Callable[..., None], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**changed)


def test_cores_may_carry_keys() -> None:
    encode(cores=zeros(L, B, R + 2, R), taps=[zeros(2, R)] * L)
    read_state(cores=zeros(L, B, R + 2, R)[:, :, :R])


def test_tables_and_masks_of_one_row_serve_all() -> None:
    encode(rotation=Rotation(zeros(1, M, 8), zeros(1, M, 8), False), valid=torch.ones(1, M, dtype=torch.bool))
    encode(rotation=Rotation(zeros(B, 1, 4), zeros(B, 1, 4), True))
