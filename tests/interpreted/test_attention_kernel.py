"""`decode_attention` in Triton's interpreter against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import LIMITS, poisoned, relative_error

from peft_pte_kernels import reference
from peft_pte_kernels.ops import attention
from peft_pte_kernels.ops.attention import decode_attention_op

LAYOUTS = {
    "contiguous": (0, 1, 2, 3),
    "slots first": (2, 0, 1, 3),
    "heads inside": (0, 2, 1, 3),
    "columns outside": (0, 1, 3, 2),
}


def laid_out(x: torch.Tensor, layout: str, padding: int) -> torch.Tensor:
    """The same [B, H, n, D] with other strides: dimensions in another order in memory, and a gap after each row."""
    order = LAYOUTS[layout]
    shape = [x.shape[i] for i in order]
    shape[-1] += padding
    memory = torch.full(shape, float("nan"), dtype=x.dtype)
    view = memory.permute([order.index(i) for i in range(4)])[tuple(slice(size) for size in x.shape)]
    view.copy_(x)
    return view


def case(
    dtype: torch.dtype,
    num_rows: int,
    num_heads: int,
    groups: int,
    head_dim: int,
    capacity: int,
    length: int,
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[torch.Tensor, ...]:
    """query, keys, values, first, length; slots that are not in use hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    query = (torch.randn(num_rows, num_heads * groups, 1, head_dim, generator=generator) * spread).to(dtype)
    keys, values = torch.randn(2, num_rows, num_heads, capacity, head_dim, generator=generator).to(dtype)
    first = torch.randint(length, (num_rows,), generator=generator, dtype=torch.int32)
    dead = torch.arange(capacity)
    dead = (dead < first[:, None]) | (dead >= length)
    keys, values = (x.masked_fill(dead[:, None, :, None], float("nan")) for x in (keys, values))
    return query, keys, values, first, torch.tensor([length], dtype=torch.int32)


def expected(query, keys, values, first, length, scaling) -> torch.Tensor:
    """The reference in float64. Its keys may hold NaN in dead slots, since their scores are masked."""
    return reference.decode_attention(query.double(), keys.double(), values.double(), first, length, scaling)


@settings(max_examples=80)
@given(
    dtype=st.sampled_from(list(LIMITS)),
    num_rows=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 4, 7, 8]),
    head_dim=st.sampled_from([8, 20, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256]),
    capacity=st.integers(1, 160),
    used=st.floats(0, 1),
    spread=st.sampled_from([0.01, 1.0, 10.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    padding=st.sampled_from([0, 3]),
    max_splits=st.sampled_from([1, 3, 8, attention.MAX_SPLITS]),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(
    dtype, num_rows, num_heads, groups, head_dim, capacity, used, spread, layout, padding, max_splits, seed
) -> None:
    length = max(1, round(used * capacity))
    query, keys, values, first, length = case(
        dtype, num_rows, num_heads, groups, head_dim, capacity, length, spread, seed
    )
    scaling = head_dim**-0.5
    strided = (laid_out(x, layout, padding) for x in (query, keys, values))
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(attention, "MAX_SPLITS", max_splits)
        actual = decode_attention_op(*strided, first, length, scaling)
    assert actual.dtype == dtype
    # float32 scores have an error in proportion to their size, and exp passes it on.
    limit = max(LIMITS[dtype], 1e-6 * spread)
    assert relative_error(actual, expected(query, keys, values, first, length, scaling)) < limit


@pytest.mark.parametrize("dtype", LIMITS)
def test_every_length(dtype: torch.dtype) -> None:
    """Splits are disjoint and complete at any length, one of them possibly empty."""
    capacity = 70
    for length in range(1, capacity + 1):
        arguments = (*case(dtype, 2, 1, 2, 16, capacity, length, seed=length), 0.3)
        assert relative_error(decode_attention_op(*arguments), expected(*arguments)) < LIMITS[dtype]


def test_more_splits_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.TILE_BYTES, 4, 1)  # blocks of 16 slots
    for length in (1, 16, 17, 95, 96):
        arguments = (*case(torch.float32, 2, 1, 2, 64, 96, length), 0.125)
        assert relative_error(decode_attention_op(*arguments), expected(*arguments)) < 1e-6


@pytest.mark.parametrize("groups", [16, 17, 40])
def test_large_groups(groups: int) -> None:
    """Groups larger than the side of a dot product, as in multi-query attention."""
    arguments = (*case(torch.float32, 2, 2, groups, 64, 40, 33), 0.125)
    assert relative_error(decode_attention_op(*arguments), expected(*arguments)) < 1e-6


def test_mixed_dtypes() -> None:
    """A float32 query over bfloat16 slots is multiplied in float32."""
    query, keys, values, first, length = case(torch.float32, 2, 2, 2, 64, 40, 33)
    keys, values = keys.bfloat16(), values.bfloat16()
    actual = decode_attention_op(query, keys, values, first, length, 0.125)
    assert actual.dtype == torch.float32
    assert relative_error(actual, expected(query, keys, values, first, length, 0.125)) < 1e-6


def test_one_slot_gives_its_value() -> None:
    query, keys, values, _, _ = case(torch.float32, 2, 2, 2, 64, 40, 40)
    values = torch.randn(values.shape)
    first, length = torch.tensor([20, 20], dtype=torch.int32), torch.tensor([21], dtype=torch.int32)
    actual = decode_attention_op(query, torch.randn(keys.shape), values, first, length, 0.125)
    torch.testing.assert_close(actual, values[:, :, 20:21].repeat_interleave(2, dim=1))


def test_extreme_scores() -> None:
    """Scores beyond the range of exp neither overflow nor lose the maximum."""
    query, keys, values, first, length = case(torch.float32, 2, 2, 2, 64, 100, 90)
    arguments = (query * 1e4, keys, values, first, length, 1.0)
    actual = decode_attention_op(*arguments)
    assert actual.isfinite().all()
    assert relative_error(actual, expected(*arguments)) < 1e-4  # scores of 1e5 have an error of 1e-2 themselves


def test_length_is_read_on_the_device() -> None:
    """The same call with another length, as a CUDA graph replays it: the launches depend on the capacity only."""
    launches = []
    query, keys, values, first, length = case(torch.float32, 2, 2, 2, 64, 96, 96)
    first.zero_()
    keys, values = torch.randn(2, *keys.shape)
    with pytest.MonkeyPatch.context() as patch:
        original = attention.launch
        patch.setattr(
            attention,
            "launch",
            lambda kernel, grid, *a, **o: (launches.append((grid, o)), original(kernel, grid, *a, **o)),
        )
        for used in (5, 50, 96):
            length.fill_(used)
            arguments = (query, keys, values, first, length, 0.125)
            assert relative_error(decode_attention_op(*arguments), expected(*arguments)) < 1e-6
    assert launches[:2] == launches[2:4] == launches[4:]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    query, keys, values, first, length = case(dtype, 2, 2, 2, 64, 96, 60)
    keys, values = (laid_out(x, layout, 0) for x in (keys, values))
    # What opcheck does with autograd does not concern an op without gradient.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        decode_attention_op, (query, keys.nan_to_num(), values.nan_to_num(), first, length, 0.125), test_utils=tests
    )
