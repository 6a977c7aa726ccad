"""The state-conditioned low-rank update y + scaling * A S B x (Eq. 5) of up to three projections of the same input.

`shrink` makes z = B x of all projections in one launch, with the weights as they are (no concatenated copy, no cast).
`expand` adds scaling * A (S z) to the base outputs of all projections in another; when rows have one token each
(decoding) every row of its tile has a state of its own, otherwise a tile lies within one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import launch, precision, register, tile

MAX_PROJECTIONS = 3
DECODE_ROWS = 4  # rows of the batch for which a program of `expand_decode_kernel` reads A once


@triton.jit
def choose(p, x0, x1, x2):
    """One of three pointers or numbers."""
    if p == 0:
        return x0
    elif p == 1:
        return x1
    else:
        return x2


@triton.jit
def shrink_kernel(
    x0, x1, x2, w0, w1, w2,          # inputs [M, K_p]; weights [R, K_p], or [K_p, R] if TRANSPOSED
    z_ptr,                           # [splits, P, M, R] float32
    M, K0, K1, K2, stride0, stride1, stride2, scale,
    R: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z_p = scale * x_p W_p^T; the third grid axis splits K. Projections are the fastest axis and share x in L2."""
    p, split = tl.program_id(0), tl.program_id(2)
    if p == 0:
        x_ptr, w_ptr, K, stride = x0, w0, K0, stride0
    elif p == 1:
        x_ptr, w_ptr, K, stride = x1, w1, K1, stride1
    else:
        x_ptr, w_ptr, K, stride = x2, w2, K2, stride2
    rows, r, k = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BK)
    x_at = rows[:, None].to(tl.int64) * stride
    per_split = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(2)) * BK
    first = split * per_split
    z = tl.zeros([BM, BR], tl.float32)
    for k0 in range(first, tl.minimum(first + per_split, K), BK):
        at = k0 + k
        x = tl.load(x_ptr + x_at + at[None, :], mask=(rows < M)[:, None] & (at < K)[None, :], other=0.0)
        w_at = at[:, None] * R + r[None, :] if TRANSPOSED else r[None, :] * K + at[:, None]
        w = tl.load(w_ptr + w_at, mask=(at < K)[:, None] & (r < R)[None, :], other=0.0)
        z = tl.dot(x.to(tl.float32), w.to(tl.float32), z, input_precision=PRECISION)
    out = (split * tl.num_programs(0) + p).to(tl.int64) * M + rows
    tl.store(z_ptr + out[:, None] * R + r[None, :], z * scale, mask=(rows < M)[:, None] & (r < R)[None, :])


@triton.jit
def expand_kernel(
    z_ptr, state_ptr,                          # [P, B T, R], [B, R, R] float32
    a0, a1, a2, base0, base1, base2, out0, out1, out2,  # A_p [O_p, R]; [B T, O_p]
    T, M, O0, O1, O2, scaling,
    R: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of BM tokens of one row and BO outputs of one projection."""
    block, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    blocks0, blocks1 = tl.cdiv(O0, BO), tl.cdiv(O1, BO)
    if block < blocks0:
        p, a_ptr, base_ptr, out_ptr, width = 0, a0, base0, out0, O0
    elif block < blocks0 + blocks1:
        p, a_ptr, base_ptr, out_ptr, width = 1, a1, base1, out1, O1
        block -= blocks0
    else:
        p, a_ptr, base_ptr, out_ptr, width = 2, a2, base2, out2, O2
        block -= blocks0 + blocks1
    t, o, r = tl.program_id(1) * BM + tl.arange(0, BM), block * BO + tl.arange(0, BO), tl.arange(0, BR)
    tokens = row * T + t
    z = tl.load(z_ptr + (p * M + tokens)[:, None] * R + r[None, :], mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    state = tl.load(state_ptr + row * R * R + r[None, :] * R + r[:, None], mask=square_mask, other=0.0)  # S^T
    u = tl.dot(z, state, input_precision=PRECISION)
    a = tl.load(a_ptr + o[None, :] * R + r[:, None], mask=(o < width)[None, :] & (r < R)[:, None], other=0.0)
    update = tl.dot(u, a.to(tl.float32), input_precision=PRECISION) * scaling
    at, mask = tokens[:, None] * width + o[None, :], (t < T)[:, None] & (o < width)[None, :]
    base = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (base + update).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand_decode_kernel(
    z_ptr, state_ptr,                          # [splits, P, B, R], [B, R, R] float32
    a0, a1, a2, base0, base1, base2, out0, out1, out2,  # A_p [O_p, R]; [B, O_p]
    B, O0, O1, O2, scaling,
    P: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One token a row: BO outputs of one projection for ROWS rows, as matrix-vector products."""
    block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(O0, BO), tl.cdiv(O1, BO)
    if block < blocks0:
        p, a_ptr, base_ptr, out_ptr, width = 0, a0, base0, out0, O0
    elif block < blocks0 + blocks1:
        p, a_ptr, base_ptr, out_ptr, width = 1, a1, base1, out1, O1
        block -= blocks0
    else:
        p, a_ptr, base_ptr, out_ptr, width = 2, a2, base2, out2, O2
        block -= blocks0 + blocks1
    o, r = block * BO + tl.arange(0, BO), tl.arange(0, BR)
    a = tl.load(a_ptr + o[:, None] * R + r[None, :], mask=(o < width)[:, None] & (r < R)[None, :], other=0.0)
    a = a.to(tl.float32)
    for i in range(ROWS):
        row = tl.program_id(1).to(tl.int64) * ROWS + i
        rank = tl.where(row < B, R, 0)  # a row that is not there has no elements
        z = tl.zeros([BR], tl.float32)
        for split in range(SPLITS):
            z += tl.load(z_ptr + ((split * P + p) * B + row) * R + r, mask=r < rank, other=0.0)
        # S^T, so that S z comes out along the columns, as A needs it.
        state_at = row * R * R + r[None, :] * R + r[:, None]
        state = tl.load(state_ptr + state_at, mask=(r < rank)[:, None] & (r < rank)[None, :], other=0.0)
        u = tl.sum(state * z[:, None], 0)
        update = tl.sum(a * u[None, :], 1) * scaling
        at, mask = row * width + o, o < tl.where(row < B, width, 0)
        base = tl.load(base_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, (base + update).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_backward_kernel(
    z_ptr, u_grad_ptr, state_ptr,    # [P, B T, R] float32: B x, scaling * dy A; [B, R, R]
    z_grad_ptr, u_ptr,               # [P, B T, R]: du S, and scaling * S z, which dA is made of
    state_grad_ptr,                  # [B, blocks, P, R, R]: du^T z of each tile
    T, M, scaling,
    R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p, block, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, r = block * BM + tl.arange(0, BM), tl.arange(0, BR)
    at = (p * M + row * T + t)[:, None] * R + r[None, :]
    mask = (t < T)[:, None] & (r < R)[None, :]
    square, square_mask = r[:, None] * R + r[None, :], (r < R)[:, None] & (r < R)[None, :]
    z_grad = tl.zeros([BM, BR], tl.float32)
    u = tl.zeros([BM, BR], tl.float32)
    for k0 in range(0, R, 16):  # in slices, since whole matrices do not fit into registers at R = 64
        k = k0 + tl.arange(0, 16)
        slice_at = (p * M + row * T + t)[:, None] * R + k[None, :]
        slice_mask = (t < T)[:, None] & (k < R)[None, :]
        state_mask = (k < R)[:, None] & (r < R)[None, :]
        u_grad = tl.load(u_grad_ptr + slice_at, mask=slice_mask, other=0.0)
        state = tl.load(state_ptr + row * R * R + k[:, None] * R + r[None, :], mask=state_mask, other=0.0)
        z_grad = tl.dot(u_grad, state, z_grad, input_precision=PRECISION)
        z = tl.load(z_ptr + slice_at, mask=slice_mask, other=0.0)
        state = tl.load(state_ptr + row * R * R + r[None, :] * R + k[:, None], mask=state_mask, other=0.0)
        u = tl.dot(z, state, u, input_precision=PRECISION)
    tl.store(z_grad_ptr + at, z_grad.to(z_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(u_ptr + at, (u * scaling).to(u_ptr.dtype.element_ty), mask=mask)
    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    u_grad = tl.load(u_grad_ptr + at, mask=mask, other=0.0)
    state_grad = tl.dot(tl.trans(u_grad), z, input_precision=PRECISION)
    part = ((row * tl.num_programs(1) + block) * tl.num_programs(0) + p) * R * R
    tl.store(state_grad_ptr + part + square, state_grad, mask=square_mask)


@triton.jit
def input_grad_kernel(
    z_grad_ptr, b0, b1, b2, x_grad_ptr,  # [P, M, R]; B_p [R, K]; [M, K]
    M, K,
    P: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = sum_p dz_p B_p, in one pass."""
    rows, k, r = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BK + tl.arange(0, BK), tl.arange(0, BR)
    rows = rows.to(tl.int64)
    x_grad = tl.zeros([BM, BK], tl.float32)
    for p in tl.static_range(P):
        b_ptr = choose(p, b0, b1, b2)
        b = tl.load(b_ptr + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)
        z_grad = tl.load(
            z_grad_ptr + (p * M + rows)[:, None] * R + r[None, :],
            mask=(rows < M)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        x_grad = tl.dot(z_grad.to(tl.float32), b.to(tl.float32), x_grad, input_precision=PRECISION)
    mask = (rows < M)[:, None] & (k < K)[None, :]
    tl.store(x_grad_ptr + rows[:, None] * K + k[None, :], x_grad.to(x_grad_ptr.dtype.element_ty), mask=mask)


def three(items: list[Any]) -> list[Any]:
    """Kernels take three of everything; those of projections that are not there are never read."""
    return [*items, *[items[-1]] * (MAX_PROJECTIONS - len(items))]


def flat(x: torch.Tensor) -> torch.Tensor:
    """[B, T, n] -> [B T, n] with neighbouring elements of a token side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def num_splits(x: torch.Tensor) -> int:
    """Parts into which `shrink` splits the input features: several in decoding, where there are few tokens."""
    return min(8, max(1, x.shape[-1] // 256)) if x.shape[1] == 1 and x.shape[0] <= 64 else 1


def shrink(
    inputs: list[torch.Tensor], weights: list[torch.Tensor], r: int, scale: float, transposed: bool, splits: int
) -> torch.Tensor:
    """Launch `shrink_kernel`: [splits, P, M, r]."""
    num_tokens = inputs[0].shape[0]
    z = inputs[0].new_empty(splits, len(inputs), num_tokens, r, dtype=torch.float32)
    block = 16 if num_tokens <= 16 else 32
    launch(
        shrink_kernel,
        (len(inputs), triton.cdiv(num_tokens, block), splits),
        *(*three(inputs), *three(weights), z, num_tokens),
        *(*three([x.shape[1] for x in inputs]), *three([x.stride(0) for x in inputs]), scale),
        R=r,
        TRANSPOSED=transposed,
        BM=block,
        BK=64,
        BR=tile(r),
        PRECISION=precision(),
        device=z.device,
        num_warps=4,
        num_stages=3,
    )
    return z


def low_rank(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
) -> list[torch.Tensor]:
    """As `reference.low_rank_update`, for up to three projections; `z` [splits, P, B T, r] is the last result."""
    num_rows, num_tokens, _ = x.shape
    r = state.shape[-1]
    state, A, B = state.contiguous(), [a.contiguous() for a in A], [b.contiguous() for b in B]
    bases = [base.contiguous() for base in bases]
    outputs = [torch.empty_like(base) for base in bases]
    splits = num_splits(x)
    z = shrink([flat(x)] * len(A), B, r, 1.0, False, splits)
    widths = three([a.shape[0] for a in A])
    tensors = z, state, *three(A), *three(bases), *three(outputs)
    options = dict(R=r, BR=tile(r), device=x.device, num_warps=4, num_stages=1)
    if num_tokens == 1:
        block = 64
        launch(
            expand_decode_kernel,
            (sum(triton.cdiv(a.shape[0], block) for a in A), triton.cdiv(num_rows, DECODE_ROWS)),
            *(*tensors, num_rows, *widths, scaling),
            P=len(A),
            SPLITS=splits,
            ROWS=DECODE_ROWS,
            BO=block,
            **dict(options, num_warps=2 if r <= 16 else 4),
        )
    else:
        block_m, block = 32, 64
        launch(
            expand_kernel,
            (sum(triton.cdiv(a.shape[0], block) for a in A), triton.cdiv(num_tokens, block_m), num_rows),
            *(*tensors, num_tokens, num_rows * num_tokens, *widths, scaling),
            BM=block_m,
            BO=block,
            PRECISION=precision(),
            **options,
        )
    return [*outputs, z]


def low_rank_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    z: torch.Tensor,
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
    needs_input: bool,
) -> list[torch.Tensor]:
    """Gradients of x [B, T, in] (empty unless `needs_input`), the state, and of each A and each B."""
    num_rows, num_tokens, width = x.shape
    r, num_projections = state.shape[-1], len(A)
    state, A, B = state.contiguous(), [a.contiguous() for a in A], [b.contiguous() for b in B]
    z = (z[0] if z.shape[0] == 1 else z.sum(0)).contiguous()
    x2, grads2 = flat(x), [flat(grad) for grad in grads]
    u_grad = shrink(grads2, A, r, scaling, True, 1)[0]
    z_grad, u = (x.new_empty(num_projections, num_rows * num_tokens, r) for _ in range(2))
    block = 32
    num_blocks = triton.cdiv(num_tokens, block)
    state_grad = state.new_empty(num_rows, num_blocks * num_projections, r, r)
    options = dict(R=r, BM=block, BR=tile(r), PRECISION=precision(), device=x.device, num_warps=4, num_stages=1)
    launch(
        state_backward_kernel,
        (num_projections, num_blocks, num_rows),
        *(z, u_grad, state, z_grad, u, state_grad, num_tokens, num_rows * num_tokens, scaling),
        **options,
    )
    x_grad = x.new_empty(x.shape if needs_input else 0)
    if needs_input:
        block_k = 64
        launch(
            input_grad_kernel,
            (triton.cdiv(width, block_k), triton.cdiv(num_rows * num_tokens, block)),
            *(z_grad, *three(B), x_grad, num_rows * num_tokens, width),
            P=num_projections,
            BK=block_k,
            **options,
        )
    # Long sums over all tokens into small matrices are what cuBLAS is good at.
    A_grads = [(grad.to(x.dtype).mT @ part).to(a.dtype) for grad, part, a in zip(grads2, u, A)]
    B_grads = [(part.mT @ x2).to(b.dtype) for part, b in zip(z_grad, B)]
    return [x_grad, state_grad.sum(1), *A_grads, *B_grads]


def fake_low_rank(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
) -> list[torch.Tensor]:
    outputs = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]
    shape = num_splits(x), len(A), x.shape[0] * x.shape[1], state.shape[-1]
    return [*outputs, x.new_empty(shape, dtype=torch.float32)]


def fake_low_rank_backward(
    grads: list[torch.Tensor],
    x: torch.Tensor,
    z: torch.Tensor,
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
    needs_input: bool,
) -> list[torch.Tensor]:
    x_grad = x.new_empty(x.shape if needs_input else (0,))
    return [x_grad, state.new_empty(state.shape), *map(torch.empty_like, A), *map(torch.empty_like, B)]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, bases, state, A, B, ctx.scaling = inputs
    ctx.num_projections = len(bases)
    ctx.save_for_backward(x, output[-1], state, *A, *B)


def backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    x, z, state, *weights = ctx.saved_tensors
    size = ctx.num_projections
    A, B, grads = weights[:size], weights[size:], grads[:size]
    x_grad, state_grad, *weight_grads = low_rank_backward_op(
        grads, x, z, state, A, B, ctx.scaling, ctx.needs_input_grad[0]
    )
    x_grad = x_grad if ctx.needs_input_grad[0] else None
    return x_grad, grads, state_grad, weight_grads[:size], weight_grads[size:], None


low_rank_backward_op = register(low_rank_backward, fake_low_rank_backward)
low_rank_op = register(low_rank, fake_low_rank, setup_context, backward)
