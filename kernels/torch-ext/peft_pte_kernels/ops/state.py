"""Reading the state: S = normalize(S_0 + Q M), or S = S_0 + bound(Q M), for all layers and rows in one launch, and its
gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import launch, limits, precision, register, tile
from ..reference import ROW_BOUND

NORMS = {"none": 0, "row": 1, "frobenius": 2, "bound": 3}
BOUND_SQUARED = tl.constexpr(ROW_BOUND**2)


@triton.jit
def product(
    a_ptr, a_row, a_column, b_ptr, b_row, b_column, R: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """a @ b of two [R, R] matrices in memory, with strides; in slices, since whole ones do not fit into registers."""
    r, k = tl.arange(0, BR), tl.arange(0, 16)
    result = tl.zeros([BR, BR], tl.float32)
    for k0 in range(0, R, 16):
        at = k0 + k
        mask = (r < R)[:, None] & (at < R)[None, :]
        a = tl.load(a_ptr + r[:, None] * a_row + at[None, :] * a_column, mask=mask, other=0.0)
        b = tl.load(
            b_ptr + at[:, None] * b_row + r[None, :] * b_column, mask=(at < R)[:, None] & (r < R)[None, :], other=0.0
        )
        result = tl.dot(a, b, result, input_precision=PRECISION)
    return result


@triton.jit
def added_state(
    query_ptr, core_ptr, R: tl.constexpr, BR: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Q M, or (Q M)^T."""
    if TRANSPOSED:
        return product(core_ptr, 1, R, query_ptr, 1, R, R, BR, PRECISION)
    else:
        return product(query_ptr, R, 1, core_ptr, R, 1, R, BR, PRECISION)


@triton.jit
def state_scale(state, NORM: tl.constexpr, R: tl.constexpr):
    """What a state is multiplied with: a number for each row [BR, 1], or one for all."""
    squares = tl.sum(state * state, 1)
    if NORM == 1:
        return (1.0 / tl.maximum(tl.sqrt(squares), 1e-12))[:, None]
    elif NORM == 3:
        return (1.0 / tl.sqrt(1.0 + squares / BOUND_SQUARED))[:, None]
    else:
        return tl.sqrt(R * 1.0) / tl.maximum(tl.sqrt(tl.sum(squares, 0)), 1e-12)


@triton.jit
def read_kernel(
    core_ptr, query_ptr, initial_ptr, state_ptr,  # [L, B, R, R], [L, R, R], [L, 1 or B, R, R], [L, B, R, R]
    B, stride_core_l, stride_core_b, stride_initial_l, stride_initial_b,
    R: tl.constexpr, BR: tl.constexpr, TRANSPOSED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    r = tl.arange(0, BR)
    square, mask = r[:, None] * R + r[None, :], (r < R)[:, None] & (r < R)[None, :]
    query, core = query_ptr + layer * R * R, core_ptr + layer * stride_core_l + row * stride_core_b
    state = added_state(query, core, R, BR, TRANSPOSED, PRECISION)
    if NORM == 3:
        state = state * state_scale(state, NORM, R)
    state += tl.load(initial_ptr + layer * stride_initial_l + row * stride_initial_b + square, mask=mask, other=0.0)
    if NORM == 1 or NORM == 2:
        state = state * state_scale(state, NORM, R)
    tl.store(state_ptr + layer_row * R * R + square, state, mask=mask)


@triton.jit
def read_backward_kernel(
    grad_ptr, core_ptr, query_ptr, initial_ptr,
    core_grad_ptr, query_grad_ptr, added_grad_ptr,  # all [L, B, R, R]: parts of each row; the gradient of Q M
    B, stride_core_l, stride_core_b, stride_initial_l, stride_initial_b,
    R: tl.constexpr, BR: tl.constexpr, TRANSPOSED: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    layer_row = tl.program_id(0).to(tl.int64)
    layer, row = layer_row // B, layer_row % B
    r = tl.arange(0, BR)
    square, mask = r[:, None] * R + r[None, :], (r < R)[:, None] & (r < R)[None, :]
    query, core = query_ptr + layer * R * R, core_ptr + layer * stride_core_l + row * stride_core_b
    grad = tl.load(grad_ptr + layer_row * R * R + square, mask=mask, other=0.0)
    if NORM > 0:
        state = added_state(query, core, R, BR, TRANSPOSED, PRECISION)
        if NORM < 3:
            at = layer * stride_initial_l + row * stride_initial_b + square
            state += tl.load(initial_ptr + at, mask=mask, other=0.0)
        scale = state_scale(state, NORM, R)
        state = state * scale
        along = tl.sum(state * grad, 1)[:, None]
        if NORM == 2:
            along = tl.sum(along, 0)[None, :] / R
        if NORM == 3:
            along = along / BOUND_SQUARED
        grad = (grad - state * along) * scale
    added_grad = added_grad_ptr + layer_row * R * R
    tl.store(added_grad + square, grad, mask=mask)
    tl.debug_barrier()  # the products below read what other threads have written
    if TRANSPOSED:
        query_grad = product(added_grad, 1, R, core, 1, R, R, BR, PRECISION)
        core_grad = product(query, 1, R, added_grad, 1, R, R, BR, PRECISION)
    else:
        query_grad = product(added_grad, R, 1, core, 1, R, R, BR, PRECISION)
        core_grad = product(query, 1, R, added_grad, R, 1, R, BR, PRECISION)
    tl.store(query_grad_ptr + layer_row * R * R + square, query_grad, mask=mask)
    tl.store(core_grad_ptr + layer_row * R * R + square, core_grad, mask=mask)


def options(cores: torch.Tensor, transposed: bool, norm: str) -> dict[str, Any]:
    r = cores.shape[-1]
    shared = dict(TRANSPOSED=transposed, NORM=NORMS[norm], device=cores.device, num_warps=4, num_stages=1)
    return dict(shared, R=r, BR=tile(r), PRECISION=precision(), **limits())


def like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def matrices(x: torch.Tensor) -> torch.Tensor:
    """`x` [L, B, r, r] with each matrix in one piece, wherever it lies: cores may have other rows between them."""
    return x if x.stride()[2:] == (x.shape[-1], 1) else x.contiguous()


def strides(cores: torch.Tensor, initial: torch.Tensor) -> tuple[int, ...]:
    return *cores.stride()[:2], initial.stride(0), initial.stride(1) if initial.shape[1] > 1 else 0


def read_states(
    cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> torch.Tensor:
    """As `reference.read_state`; all tensors are float32."""
    cores, query, initial = matrices(cores), query.contiguous(), matrices(initial)
    states = like(cores)
    launch(
        read_kernel,
        (cores.shape[0] * cores.shape[1],),
        *(cores, query, initial, states, cores.shape[1], *strides(cores, initial)),
        **options(cores, transposed, norm),
    )
    return states


def read_states_backward(
    grad: torch.Tensor, cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of cores, query and initial."""
    cores, query, initial, grad = matrices(cores), query.contiguous(), matrices(initial), grad.contiguous()
    core_grad, query_grad, added_grad = (like(cores) for _ in range(3))
    launch(
        read_backward_kernel,
        (cores.shape[0] * cores.shape[1],),
        *(grad, cores, query, initial, core_grad, query_grad, added_grad, cores.shape[1], *strides(cores, initial)),
        **options(cores, transposed, norm),
    )
    # S_0 + bound(Q M) passes the gradient on to S_0 as it is; a result may not be the argument itself.
    initial_grad = grad if norm == "bound" else added_grad
    initial_grad = initial_grad.sum(1, keepdim=True) if initial.shape[1] == 1 else initial_grad.clone()
    return core_grad, query_grad.sum(1), initial_grad


def fake_read_states(
    cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> torch.Tensor:
    return like(cores)


def fake_read_states_backward(
    grad: torch.Tensor, cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return like(cores), like(query), like(initial)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.transposed, ctx.norm = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return *read_states_backward_op(grad, *ctx.saved_tensors, ctx.transposed, ctx.norm), None, None


read_states_backward_op = register(read_states_backward, fake_read_states_backward)
read_states_op = register(read_states, fake_read_states, setup_context, backward)
