"""Attention of one new token over the slots in use: split-KV flash decoding for grouped queries, inference only.

`attend` has one program for each row, key/value head and split of the slots. The query heads of a group, up to 16, are
the M side of the dot products, so that keys and values are read once. Half-precision operands are multiplied as they
are and summed in float32. `combine` joins the splits, and is left out if there is one.

`first` and `length` are read on the device: launches depend on the capacity only, so that a CUDA graph of them can be
replayed while the cache grows, and slots that are not in use are never read. A split's share follows the slots in use,
not the capacity, so that all splits have work at any length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..dispatch import launch, limits, register, tile

# Programs to aim for: about two for each multiprocessor of a large GPU.
TARGET_PROGRAMS = 256
MAX_SPLITS = 64
# Query heads of a program: the least that `tl.dot` takes. A larger group is spread over several programs.
GROUP = 16
# By element size: bytes of a tile of keys or values, and stages of them in shared memory. float32 is multiplied without
# tensor cores, from registers, and wider tiles would spill.
TILE_BYTES = {2: 16384, 4: 8192}
NUM_STAGES = {2: 3, 4: 2}
# Columns of a head that one program of `combine` joins.
COMBINED_COLUMNS = 64


@triton.jit
def attend_kernel(
    query_ptr, keys_ptr, values_ptr, first_ptr, length_ptr, out_ptr, sums_ptr,
    H, G, D,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    scaling,
    SPLITS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Attention over one split.

    With several splits `out` [B, H_q, SPLITS, D] gets weighted sums of values and `sums` [2, B, H_q, SPLITS] the
    largest score, in powers of two, and the sum of weights relative to it; a split without slots gets -inf and zeros.
    With one split `out` gets the result.
    """
    split, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(G, BG)
    head = (tl.program_id(1) // parts).to(tl.int64)
    g = tl.program_id(1) % parts * BG + tl.arange(0, BG)
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    first = tl.load(first_ptr + row).to(tl.int64)
    length = tl.load(length_ptr).to(tl.int64)
    share = tl.cdiv(tl.cdiv(length - first, BN), SPLITS) * BN
    start = first + split * share
    end = tl.minimum(start + share, length)

    query_mask = (g < G)[:, None] & (d < D)[None, :]
    query_at = row * stride_qb + (head * G + g)[:, None] * stride_qh + d[None, :]
    q = tl.load(query_ptr + query_at, mask=query_mask, other=0.0)
    keys_base = keys_ptr + row * stride_kb + head * stride_kh
    values_base = values_ptr + row * stride_vb + head * stride_vh
    largest = tl.full([BG], float("-inf"), tl.float32)
    weight = tl.zeros([BG], tl.float32)
    total = tl.zeros([BG, BD], tl.float32)
    for block in range(start, end, BN):
        slots = block + n
        mask = (slots < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys_base + slots[:, None] * stride_kn + d[None, :], mask=mask, other=0.0)
        v = tl.load(values_base + slots[:, None] * stride_vn + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        scores = tl.where((slots < end)[None, :], scores, float("-inf"))
        # A block has at least one slot, so that the new maximum is finite; exp2 of -inf minus it is zero.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        p = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        weight = weight * shrink + tl.sum(p, 1)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        largest = new_largest

    heads = (row * H + head) * G + g
    if SPLITS == 1:
        result = (total / weight[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + heads[:, None] * D + d[None, :], result, mask=query_mask)
    else:
        at = heads * SPLITS + split
        tl.store(out_ptr + at[:, None] * D + d[None, :], total, mask=query_mask)
        tl.store(sums_ptr + at, largest, mask=g < G)
        tl.store(sums_ptr + tl.num_programs(2).to(tl.int64) * H * G * SPLITS + at, weight, mask=g < G)


@triton.jit
def combine_kernel(
    partial_ptr, sums_ptr, out_ptr, D, SPLITS: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Join the splits of one query head, for some of its columns."""
    head = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, BS), tl.program_id(1) * BD + tl.arange(0, BD)
    at = head * SPLITS + s
    # The first split has slots, so there is a finite maximum.
    largest = tl.load(sums_ptr + at, mask=s < SPLITS, other=float("-inf"))
    weight_base = sums_ptr + tl.num_programs(0).to(tl.int64) * SPLITS
    weight = tl.load(weight_base + at, mask=s < SPLITS, other=0.0)
    factor = tl.exp2(largest - tl.max(largest, 0))
    mask = (s < SPLITS)[:, None] & (d < D)[None, :]
    partial = tl.load(partial_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(partial * factor[:, None], 0) / tl.sum(weight * factor, 0)
    tl.store(out_ptr + head * D + d, result.to(out_ptr.dtype.element_ty), mask=d < D)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """As `reference.decode_attention`; every row must have at least one slot in use."""
    dtype = query.dtype
    if not dtype == keys.dtype == values.dtype:
        query, keys, values = query.float(), keys.float(), values.float()
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    first, length = first.contiguous(), length.contiguous()
    num_rows, num_queries, _, head_dim = query.shape
    num_heads, capacity = keys.shape[1:3]
    groups = num_queries // num_heads
    columns, size = tile(head_dim), keys.element_size()
    block = min(64, max(16, TILE_BYTES[size] // (columns * size)))
    parts = num_heads * triton.cdiv(groups, GROUP)
    splits = min(triton.cdiv(TARGET_PROGRAMS, num_rows * parts), triton.cdiv(capacity, block), MAX_SPLITS)
    out = query.new_empty(num_rows, num_queries, 1, head_dim, dtype=dtype)
    partial = sums = out
    if splits > 1:
        partial = query.new_empty(num_rows, num_queries, splits, head_dim, dtype=torch.float32)
        sums = query.new_empty(2, num_rows, num_queries, splits, dtype=torch.float32)
    launch(
        attend_kernel,
        (splits, parts, num_rows),
        *(query, keys, values, first, length, partial, sums, num_heads, groups, head_dim),
        *(*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]),
        scaling * math.log2(math.e),
        SPLITS=splits,
        BG=GROUP,
        BN=block,
        BD=columns,
        device=query.device,
        num_warps=4,
        num_stages=NUM_STAGES[size] if columns * size < 2048 else 1,  # AMD has 64 KB of shared memory
        **(limits() if size == 2 else {}),  # float32 has room by itself; told to, ptxas takes all and more
    )
    if splits > 1:
        launch(
            combine_kernel,
            (num_rows * num_queries, triton.cdiv(head_dim, COMBINED_COLUMNS)),
            *(partial, sums, out, head_dim),
            SPLITS=splits,
            BS=triton.next_power_of_2(splits),
            BD=COMBINED_COLUMNS,
            device=query.device,
            num_warps=4,
            num_stages=1,
        )
    return out


def fake_decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


decode_attention_op = register(decode_attention, fake_decode_attention)
