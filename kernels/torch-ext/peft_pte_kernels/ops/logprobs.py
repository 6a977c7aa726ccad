"""Log-probabilities of given tokens and the entropy, in one pass over the logits, and their gradient in another.

The pass keeps the largest logit m so far, s = sum e^(x - m) and t = sum (x - m) e^(x - m), which are rescaled when m
grows. At its end the normalizer is m + log s and the entropy log s - t / s: both without cancellation for logits that
are all far from zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..dispatch import launch, register, tile

# Logits that a program has in registers at once.
BLOCK = 4096


@triton.jit
def logprobs_kernel(
    logits_ptr, target_ptr,                # [outer, inner, V]; [outer inner] int64
    logprob_ptr, entropy_ptr, normalizer_ptr,  # [outer inner] float32
    inner, V, stride_outer, stride_inner, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row. A target outside the vocabulary gives NaN."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row // inner * stride_outer + row % inner * stride_inner
    v = tl.arange(0, BLOCK)
    largest = float("-inf")
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(base + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        new = tl.maximum(largest, tl.max(x, 0))
        # While all logits are -inf nothing is subtracted, since differences of infinities are NaN.
        floor = tl.where(new == float("-inf"), 0.0, new)
        shift = tl.where(largest == float("-inf"), floor, largest) - floor
        scale = tl.exp(shift)
        x = x - floor
        weight = tl.exp(x)
        weighted = (weighted + total * shift) * scale + tl.where(x == float("-inf"), 0.0, x) * weight
        total = total * scale + weight
        largest = new
    s = tl.sum(total, 0)
    normalizer = largest + tl.log(s)
    target = tl.load(target_ptr + row)
    known = (target >= 0) & (target < V)
    x = tl.load(base + target, mask=known, other=float("nan")).to(tl.float32) * inverse_temperature
    tl.store(logprob_ptr + row, x - normalizer)
    tl.store(entropy_ptr + row, tl.log(s) - tl.sum(weighted, 0) / s)
    tl.store(normalizer_ptr + row, normalizer)


@triton.jit
def logprobs_backward_kernel(
    grad_ptr, logits_ptr, target_ptr, normalizer_ptr,  # as in `logprobs_kernel`; the gradient of the log-probability
    logits_grad_ptr,                                   # [outer inner, V]
    inner, V, stride_outer, stride_inner, inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK logits of one row: dx = g (onehot - softmax) / temperature."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row // inner * stride_outer + row % inner * stride_inner
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = v < V
    normalizer = tl.load(normalizer_ptr + row)
    grad = tl.load(grad_ptr + row) * inverse_temperature
    x = tl.load(base + v, mask=mask, other=float("-inf")).to(tl.float32) * inverse_temperature
    onehot = tl.where(v == tl.load(target_ptr + row), 1.0, 0.0)
    logits_grad = grad * (onehot - tl.exp(x - normalizer))
    tl.store(logits_grad_ptr + row * V + v, logits_grad.to(logits_grad_ptr.dtype.element_ty), mask=mask)


def rows_of(logits: torch.Tensor) -> torch.Tensor:
    """[..., V] -> [outer, inner, V] with neighbouring logits side by side; a view where that can be."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    *outer, inner = logits.shape[:-1] or (1,)
    return logits.reshape(math.prod(outer), inner, logits.shape[-1])


def options(logits: torch.Tensor) -> dict[str, Any]:
    block = min(BLOCK, tile(logits.shape[-1]))
    return dict(BLOCK=block, device=logits.device, num_warps=8 if block > 1024 else 4, num_stages=2)


def logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.token_logprobs`; the normalizer [...] (float32), which the gradient needs, is the last result."""
    rows = rows_of(logits)
    results = tuple(logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    launch(
        logprobs_kernel,
        (targets.numel(),),
        *(rows, targets.contiguous(), *results, rows.shape[1], rows.shape[2], *rows.stride()[:2], 1 / temperature),
        **options(logits),
    )
    return results


def logprobs_backward(
    grad: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The gradient of the logits, in their dtype."""
    rows, constants = rows_of(logits), options(logits)
    logits_grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    launch(
        logprobs_backward_kernel,
        (targets.numel(), triton.cdiv(rows.shape[2], constants["BLOCK"])),
        *(grad.contiguous(), rows, targets.contiguous(), normalizer, logits_grad),
        *(rows.shape[1], rows.shape[2], *rows.stride()[:2], 1 / temperature),
        **constants,
    )
    return logits_grad


def fake_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprob, entropy, normalizer = (logits.new_empty(targets.shape, dtype=torch.float32) for _ in range(3))
    return logprob, entropy, normalizer


def fake_logprobs_backward(
    grad: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, normalizer: torch.Tensor, temperature: float
) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, ctx.temperature = inputs
    _, entropy, normalizer = output
    ctx.mark_non_differentiable(entropy, normalizer)
    ctx.save_for_backward(logits, targets, normalizer)


def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    return logprobs_backward_op(grad, *ctx.saved_tensors, ctx.temperature), None, None


logprobs_backward_op = register(logprobs_backward, fake_logprobs_backward)
logprobs_op = register(logprobs, fake_logprobs, setup_context, backward)
