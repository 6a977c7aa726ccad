"""The state-conditioned low-rank update y + scaling * A S B x (Eq. 5) of up to three projections of the same input.

Segments: z = B x of all projections is one matrix product of the BLAS library, which such products are best left to;
`expand` adds scaling * A (S z) to all base outputs in one launch, without anything in between in memory. So for the
gradient: products of long and thin matrices by the library, what touches the states by `state_backward`.

Decoding (one token a row, each with a state of its own): `shrink` makes z in one launch, with the weights as they are
(no concatenated copy, no cast), split over the input features, and `expand_decode` does the rest in another.

A gate, 2 sigmoid(G x) * S B x for one projection, is one more column of z: G stands behind B.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import launch, limits, num_warps, precision, register, tile

MAX_PROJECTIONS = 3
# Tiles. A program of `expand_kernel` reads its part of A and a state once for all its tokens. Widths that are no
# multiple of 16 are read element by element, and the addresses take the registers of a larger tile, as wide gates do.
TOKENS, OUTPUTS = 64, 128
ODD_TOKENS, ODD_OUTPUTS = 32, 64
BACKWARD_TOKENS = 32
SHRINK_ROWS = 16
# A program of `expand_decode_kernel` reads its part of A once for several rows, one after the other; where that would
# make fewer programs than this, about two for each multiprocessor of a large GPU, it has one row.
DECODE_ROWS, DECODE_OUTPUTS = 4, 128
TARGET_PROGRAMS = 256


@triton.jit
def shrink_kernel(
    x_ptr, b0, b1, b2,               # [M, K]; B_p [R, K]
    z_ptr,                           # [splits, P, M, R] float32
    M, K, stride_x,
    R: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z_p = x B_p^T; the third grid axis splits K. Projections are the fastest axis and share x in L2."""
    p, split = tl.program_id(0), tl.program_id(2)
    if p == 0:
        b_ptr = b0
    elif p == 1:
        b_ptr = b1
    else:
        b_ptr = b2
    rows, r, k = tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BR), tl.arange(0, BK)
    x_at = rows[:, None].to(tl.int64) * stride_x
    per_split = tl.cdiv(tl.cdiv(K, BK), tl.num_programs(2)) * BK
    first = split * per_split
    z = tl.zeros([BM, BR], tl.float32)
    for k0 in range(first, tl.minimum(first + per_split, K), BK):
        at = k0 + k
        x = tl.load(x_ptr + x_at + at[None, :], mask=(rows < M)[:, None] & (at < K)[None, :], other=0.0)
        b_at = r[None, :] * K + at[:, None]
        b = tl.load(b_ptr + b_at, mask=(at < K)[:, None] & (r < R)[None, :], other=0.0)
        z = tl.dot(x.to(tl.float32), b.to(tl.float32), z, input_precision=PRECISION)
    out = (split * tl.num_programs(0) + p).to(tl.int64) * M + rows
    tl.store(z_ptr + out[:, None] * R + r[None, :], z, mask=(rows < M)[:, None] & (r < R)[None, :])


@triton.jit
def expand_kernel(
    z_ptr, state_ptr,                          # [B T, P, R], [B, R, R] float32
    a0, a1, a2, base0, base1, base2, out0, out1, out2,  # A_p [O_p, R]; [B T, O_p]
    T, O0, O1, O2, scaling,
    P: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of BM tokens of one row and BO outputs of one projection. P: columns of z, of which the last may be G x."""
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
    at, mask = tokens[:, None] * width + o[None, :], (t < T)[:, None] & (o < width)[None, :]
    base = tl.load(base_ptr + at, mask=mask, other=0.0)  # before the products, so that memory is waited for once
    z_at = (tokens * P + p)[:, None] * R + r[None, :]
    z = tl.load(z_ptr + z_at, mask=(t < T)[:, None] & (r < R)[None, :], other=0.0)
    square_mask = (r < R)[:, None] & (r < R)[None, :]
    state = tl.load(state_ptr + row * R * R + r[None, :] * R + r[:, None], mask=square_mask, other=0.0)  # S^T
    u = tl.dot(z, state, input_precision=PRECISION)
    if GATED:
        u *= 2 * tl.sigmoid(tl.load(z_ptr + z_at + R, mask=(t < T)[:, None] & (r < R)[None, :], other=0.0))
    a = tl.load(a_ptr + o[None, :] * R + r[:, None], mask=(o < width)[None, :] & (r < R)[:, None], other=0.0)
    update = tl.dot(u, a.to(tl.float32), input_precision=PRECISION) * scaling
    tl.store(out_ptr + at, (base.to(tl.float32) + update).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expand_decode_kernel(
    z_ptr, state_ptr,                          # [splits, P, B, R], [B, R, R] float32
    a0, a1, a2, base0, base1, base2, out0, out1, out2,  # A_p [O_p, R]; [B, O_p]
    B, O0, O1, O2, scaling,
    P: tl.constexpr, GATED: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BO: tl.constexpr,
    BR: tl.constexpr,
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
        at, mask = row * width + o, o < tl.where(row < B, width, 0)
        base = tl.load(base_ptr + at, mask=mask, other=0.0)  # before the sums, so that memory is waited for once
        z = tl.zeros([BR], tl.float32)
        for split in range(SPLITS):
            z += tl.load(z_ptr + ((split * P + p) * B + row) * R + r, mask=r < rank, other=0.0)
        # S^T, so that S z comes out along the columns, as A needs it.
        state_at = row * R * R + r[None, :] * R + r[:, None]
        state = tl.load(state_ptr + state_at, mask=(r < rank)[:, None] & (r < rank)[None, :], other=0.0)
        u = tl.sum(state * z[:, None], 0)
        if GATED:
            g = tl.zeros([BR], tl.float32)
            for split in range(SPLITS):
                g += tl.load(z_ptr + ((split * P + p + 1) * B + row) * R + r, mask=r < rank, other=0.0)
            u *= 2 * tl.sigmoid(g)
        update = tl.sum(a * u[None, :], 1) * scaling
        tl.store(out_ptr + at, (base.to(tl.float32) + update).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def state_backward_kernel(
    z_ptr, u_grad_ptr, state_ptr,    # float32: [B T, P, R], B x; [P, B T, R], dy A; [B, R, R]
    z_grad_ptr, u_ptr,               # [B T, P, R]: scaling du S; [P, B T, R]: scaling S z, which dA is made of
    # With a gate f = 2 sigmoid(g), g the last of P columns of z and z_grad: du f for du, f S z for S z.
    state_grad_ptr,                  # [B, blocks, P, R, R] float32: scaling du^T z of each tile
    T, M, scaling,
    P: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, p, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t, r = block * BM + tl.arange(0, BM), tl.arange(0, BR)
    tokens = row * T + t
    z_base, u_base, mask = (tokens * P + p)[:, None] * R, (p * M + tokens)[:, None] * R, (t < T)[:, None]
    square, square_mask = r[:, None] * R + r[None, :], (r < R)[:, None] & (r < R)[None, :]
    z_grad = tl.zeros([BM, BR], tl.float32)
    u = tl.zeros([BM, BR], tl.float32)
    for k0 in range(0, R, 16):  # in slices, since whole matrices do not fit into registers at R = 64
        k = k0 + tl.arange(0, 16)
        slice_mask, state_mask = mask & (k < R)[None, :], (k < R)[:, None] & (r < R)[None, :]
        u_grad = tl.load(u_grad_ptr + u_base + k[None, :], mask=slice_mask, other=0.0)
        if GATED:
            u_grad *= 2 * tl.sigmoid(tl.load(z_ptr + z_base + R + k[None, :], mask=slice_mask, other=0.0))
        state = tl.load(state_ptr + row * R * R + k[:, None] * R + r[None, :], mask=state_mask, other=0.0)
        z_grad = tl.dot(u_grad, state, z_grad, input_precision=PRECISION)
        z = tl.load(z_ptr + z_base + k[None, :], mask=slice_mask, other=0.0)
        state = tl.load(state_ptr + row * R * R + r[None, :] * R + k[:, None], mask=state_mask, other=0.0)
        u = tl.dot(z, state, u, input_precision=PRECISION)
    mask = mask & (r < R)[None, :]
    u_grad = tl.load(u_grad_ptr + u_base + r[None, :], mask=mask, other=0.0)
    if GATED:
        gate = 2 * tl.sigmoid(tl.load(z_ptr + z_base + R + r[None, :], mask=mask, other=0.0))
        gate_grad = u_grad * u * gate * (1 - gate / 2) * scaling
        tl.store(z_grad_ptr + z_base + R + r[None, :], gate_grad.to(z_grad_ptr.dtype.element_ty), mask=mask)
        u, u_grad = u * gate, u_grad * gate
    tl.store(z_grad_ptr + z_base + r[None, :], (z_grad * scaling).to(z_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(u_ptr + u_base + r[None, :], (u * scaling).to(u_ptr.dtype.element_ty), mask=mask)
    z = tl.load(z_ptr + z_base + r[None, :], mask=mask, other=0.0)
    state_grad = tl.dot(tl.trans(u_grad), z, input_precision=PRECISION) * scaling
    part = ((row * tl.num_programs(2) + block) * tl.num_programs(1) + p) * R * R
    tl.store(state_grad_ptr + part + square, state_grad, mask=square_mask)


def three(items: list[Any]) -> list[Any]:
    """Kernels take three of everything; those of projections that are not there are never read."""
    return [*items, *[items[-1]] * (MAX_PROJECTIONS - len(items))]


def flat(x: torch.Tensor) -> torch.Tensor:
    """[B, T, n] -> [B T, n] with neighbouring elements of a token side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """a @ b of matrices of one dtype, in that dtype or in float32; autocast would change both operands and result."""
    with torch.autocast(a.device.type, enabled=False):
        if dtype == a.dtype:
            return a @ b
        if a.is_cuda and torch.version.hip is None:
            return torch.mm(a, b, out_dtype=dtype)
        return a.to(dtype) @ b.to(dtype)


def num_splits(num_rows: int, width: int, num_projections: int) -> int:
    """Parts into which `shrink` splits the input features in decoding, where there are few rows."""
    num_programs = num_projections * triton.cdiv(num_rows, SHRINK_ROWS)
    return max(1, min(8, width // 256, 256 // num_programs))


def shrink(x: torch.Tensor, B: list[torch.Tensor], r: int) -> torch.Tensor:
    """Launch `shrink_kernel` for [M, in]: [splits, P, M, r] float32."""
    num_rows, width = x.shape
    splits = num_splits(num_rows, width, len(B))
    z = x.new_empty(splits, len(B), num_rows, r, dtype=torch.float32)
    launch(
        shrink_kernel,
        (len(B), triton.cdiv(num_rows, SHRINK_ROWS), splits),
        *(x, *three(B), z, num_rows, width, x.stride(0)),
        R=r,
        BM=SHRINK_ROWS,
        BK=64,
        BR=tile(r),
        PRECISION=precision(),
        device=x.device,
        num_warps=4,
        num_stages=3,
        **limits(),
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
    """As `reference.low_rank_update`, for up to three projections; what the gradient needs is the last result.

    `B` has one matrix more than `A` if there is a gate.
    """
    num_rows, num_tokens, _ = x.shape
    r, num_columns, gated = state.shape[-1], len(B), len(B) > len(A)
    state, A, B = state.contiguous(), [a.contiguous() for a in A], [b.contiguous() for b in B]
    bases = [base.contiguous() for base in bases]
    outputs = [torch.empty_like(base) for base in bases]
    decoding = num_tokens == 1
    z = shrink(flat(x), B, r) if decoding else product(flat(x), torch.cat(B).to(x.dtype).mT)
    tensors = z, state, *three(A), *three(bases), *three(outputs)
    widths = three([a.shape[0] for a in A])
    options = dict(P=num_columns, GATED=gated, R=r, BR=tile(r), device=x.device, num_stages=1, **limits())
    if decoding:
        blocks = sum(triton.cdiv(a.shape[0], DECODE_OUTPUTS) for a in A)
        rows = DECODE_ROWS if blocks * triton.cdiv(num_rows, DECODE_ROWS) >= TARGET_PROGRAMS else 1
        launch(
            expand_decode_kernel,
            (blocks, triton.cdiv(num_rows, rows)),
            *(*tensors, num_rows, *widths, scaling),
            SPLITS=z.shape[0],
            ROWS=rows,
            BO=DECODE_OUTPUTS,
            num_warps=4,
            **options,
        )
    else:
        has_room = all(a.shape[0] % 16 == 0 for a in A) and not (gated and r > 32)
        tokens, block = (TOKENS, OUTPUTS) if has_room else (ODD_TOKENS, ODD_OUTPUTS)
        launch(
            expand_kernel,
            (sum(triton.cdiv(a.shape[0], block) for a in A), triton.cdiv(num_tokens, tokens), num_rows),
            *(*tensors, num_tokens, *widths, scaling),
            BM=tokens,
            BO=block,
            PRECISION=precision(),
            num_warps=num_warps(r),
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
    """Gradients of x [B, T, in] (empty unless `needs_input`), the state, all B together [P r, in], and each A.

    P: with the gate's, which is the last.
    """
    num_rows, num_tokens, _ = x.shape
    r, num_projections, num_columns, dtype = state.shape[-1], len(A), len(B), x.dtype
    if num_tokens == 1:  # hardly any work: as exact as the forward
        z, dtype = z.sum(0).transpose(0, 1), torch.float32
    state, x2 = state.contiguous(), flat(x).to(dtype)
    z = z.reshape(-1, num_columns, r).contiguous()
    weight, grads = torch.cat(B).to(dtype), [flat(grad).to(dtype) for grad in grads]
    u_grad = torch.stack([product(grad, a.to(dtype)) for grad, a in zip(grads, A)])
    z_grad, u = torch.empty_like(z, dtype=dtype), torch.empty_like(u_grad, dtype=dtype)
    num_blocks = triton.cdiv(num_tokens, BACKWARD_TOKENS)
    state_grad = state.new_empty(num_rows, num_blocks * num_projections, r, r)
    launch(
        state_backward_kernel,
        (num_rows, num_projections, num_blocks),
        *(z, u_grad, state, z_grad, u, state_grad, num_tokens, num_rows * num_tokens, scaling),
        P=num_columns,
        GATED=num_columns > num_projections,
        R=r,
        BM=BACKWARD_TOKENS,
        BR=tile(r),
        PRECISION=precision(),
        device=x.device,
        num_warps=4,
        num_stages=1,
        **limits(),
    )
    z_grad = z_grad.flatten(1)
    x_grad = product(z_grad, weight, dtype).view(x.shape).to(x.dtype) if needs_input else x.new_empty(0)
    A_grads = [product(grad.mT, part).to(a.dtype) for grad, part, a in zip(grads, u, A)]
    return [x_grad, state_grad.sum(1), product(z_grad.mT, x2), *A_grads]


def fake_low_rank(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
) -> list[torch.Tensor]:
    outputs = [torch.empty_like(base, memory_format=torch.contiguous_format) for base in bases]
    num_rows, num_tokens, width = x.shape
    r = state.shape[-1]
    if num_tokens == 1:
        shape = num_splits(num_rows, width, len(B)), len(B), num_rows, r
        return [*outputs, x.new_empty(shape, dtype=torch.float32)]
    return [*outputs, x.new_empty(num_rows * num_tokens, len(B) * r, dtype=torch.float32)]


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
    B_grad = x.new_empty(sum(b.shape[0] for b in B), x.shape[-1], dtype=torch.float32)
    return [x_grad, state.new_empty(state.shape), B_grad, *map(torch.empty_like, A)]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, bases, state, A, B, ctx.scaling = inputs
    ctx.num_projections, ctx.dtypes = len(bases), [base.dtype for base in bases]
    ctx.mark_non_differentiable(output[-1])
    ctx.set_materialize_grads(False)  # else a gradient of zeros is made for z
    ctx.save_for_backward(x, output[-1], state, *A, *B)


def backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    x, z, state, *weights = ctx.saved_tensors
    size = ctx.num_projections
    A, B = weights[:size], weights[size:]
    grads = [
        x.new_zeros(*x.shape[:-1], a.shape[0], dtype=dtype) if grad is None else grad
        for grad, a, dtype in zip(grads, A, ctx.dtypes)
    ]
    x_grad, state_grad, B_grad, *A_grads = low_rank_backward_op(
        grads, x, z, state, A, B, ctx.scaling, ctx.needs_input_grad[0]
    )
    x_grad = x_grad if ctx.needs_input_grad[0] else None
    B_grads = [part.to(b.dtype) for part, b in zip(B_grad.chunk(len(B)), B)]
    return x_grad, grads, state_grad, A_grads, B_grads, None


low_rank_backward_op = register(low_rank_backward, fake_low_rank_backward)
low_rank_op = register(low_rank, fake_low_rank, setup_context, backward)
