"""The cache update: what stays moves down over what was evicted, in place, for all layers in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..dispatch import launch, register, tile
from .encode import addresses
from .encode_kernels import layer_pointer

# Slots that move at once, and bytes of them, which are held in registers.
BLOCK = 64
BLOCK_BYTES = 32768


@triton.jit
def compact_kernel(
    slots_ptr, table,                # keys or values, [B, H, capacity, D]; addresses [N] of all of them
    start, count, length, H, D, stride_b, stride_h, stride_m,
    TABLE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One program moves the slots of one head, from the lowest on, so that nothing is overwritten before it is read."""
    row_head = tl.program_id(0)
    row, head = (row_head // H).to(tl.int64), (row_head % H).to(tl.int64)
    base = layer_pointer(slots_ptr, table, tl.program_id(1), TABLE) + row * stride_b + head * stride_h
    n, d = tl.arange(0, BN), tl.arange(0, BD)
    for first in range(start, length - count, BN):
        slots = tl.cast(first + n, tl.int64)
        at = slots[:, None] * stride_m + d[None, :]
        mask = (slots < length - count)[:, None] & (d < D)[None, :]
        x = tl.load(base + at + tl.cast(count, tl.int64) * stride_m, mask=mask, other=0.0)
        tl.debug_barrier()  # where fewer than BN slots have left, this block is written into what it is read from
        tl.store(base + at, x, mask=mask)


def compact(slots: list[torch.Tensor], start: int, count: int, length: int) -> None:
    """As `reference.compact`: one launch for all tensors that differ in their address only, else one for each."""
    torch.autograd.graph.increment_version(slots)  # what a kernel changes autograd does not see by itself
    first = slots[0]
    uniform = all(
        (x.dtype, x.shape, x.stride(), x.data_ptr() % 16) == (first.dtype, first.shape, first.stride(), 0)
        for x in slots
    )
    for group in [slots] if uniform else [[x] for x in slots]:
        num_rows, num_heads, _, head_dim = group[0].shape
        columns = tile(head_dim)
        launch(
            compact_kernel,
            (num_rows * num_heads, len(group)),
            *(group[0], addresses(group), start, count, length, num_heads, head_dim, *group[0].stride()[:3]),
            TABLE=len(group) > 1,
            BN=max(1, min(BLOCK, BLOCK_BYTES // (columns * group[0].element_size()))),
            BD=columns,
            device=first.device,
            num_warps=4,
            num_stages=1,
        )


def fake_compact(slots: list[torch.Tensor], start: int, count: int, length: int) -> None:
    return None


compact_op = register(compact, fake_compact, mutates=("slots",))
