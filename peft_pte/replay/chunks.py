"""Functions of hidden states with large logits on the way, chunk by chunk, so that few of them exist at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

# Tokens (of all rows together) whose logits exist at the same time.
CHUNK_TOKENS = 1024

Results = tuple[torch.Tensor, torch.Tensor]  # each [B, q]; the first one carries a gradient
# The results of a chunk, from hidden states [B, q, D] and what they are compared with, [B, q, ...].
ChunkFunction = Callable[[torch.Tensor, torch.Tensor], Results]


def num_chunks(batch_size: int, length: int) -> int:
    """How many chunks `token_results` makes of so many columns at most."""
    return math.ceil(length / chunk_size(batch_size))


def chunk_size(batch_size: int) -> int:
    return max(1, CHUNK_TOKENS // batch_size)


class WithGradients(torch.autograd.Function):
    """A function of chunks and, in the same pass, the gradient of each token's result by its own hidden state.

    So logits are made once, where recomputing them in the backward pass would make them twice. Kept is as much as
    recomputing needs: [B, q, D]. Liger's fused cross-entropy (arXiv 2410.10989) does so for a mean loss.
    """

    @staticmethod
    def forward(ctx: Any, function: ChunkFunction, hidden_states: torch.Tensor, targets: torch.Tensor) -> Results:
        # Whoever keeps saved tensors elsewhere, or not at all (checkpointing), has nothing to do with this graph.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            leaf = hidden_states.detach().requires_grad_()
            differentiable, other = function(leaf, targets)
            # Outside of the forward's autocast, as `loss.backward()` is.
            with torch.autocast(leaf.device.type, enabled=False):
                (gradient,) = torch.autograd.grad(differentiable.sum(), leaf)
        ctx.save_for_backward(gradient)
        differentiable, other = differentiable.detach(), other.detach()
        ctx.mark_non_differentiable(other)
        return differentiable, other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor, _: Any) -> tuple[None, torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * gradients[..., None]).to(gradient.dtype), None


def span_of(columns: list[bool]) -> tuple[int, int]:
    """From the first column that is True to behind the last one; (0, 0) if there is none."""
    wanted = [column for column, is_wanted in enumerate(columns) if is_wanted]
    return (wanted[0], wanted[-1] + 1) if wanted else (0, 0)


def token_results(
    function: ChunkFunction,
    is_frozen: bool,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    needed: torch.Tensor,
    span: tuple[int, int] | None = None,
    least_chunks: int = 0,
) -> Results:
    """The results of `function` for any number of tokens, chunk by chunk, so that no logits wait for a backward pass.

    With a head that `is_frozen` (`head_is_frozen`) gradients are taken at once; else chunks are computed again.

    `targets` may wait in host memory. `needed` [B, q]: columns that no row needs are left out at both ends; results are
    zero where it is False. `span`: the `span_of` that, if the host knows it, which else has to wait for the device.
    `least_chunks`: the function is called at least so often, if need be for nothing.
    """
    first, last = span_of(needed.any(0).tolist()) if span is None else span
    dtype = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32

    def run(chunk: slice) -> Results:
        arguments = hidden_states[:, chunk], targets[:, chunk].to(hidden_states.device, non_blocking=True)
        if not torch.is_grad_enabled() or (is_frozen and not hidden_states.requires_grad):
            return function(*arguments)
        # What is sharded is gathered by hooks, for the forward and the backward pass of the whole model.
        if is_frozen and not least_chunks:
            return WithGradients.apply(function, *arguments)
        return checkpoint(function, *arguments, use_reentrant=False)

    size = chunk_size(needed.shape[0])
    parts = [run(slice(start, min(last, start + size))) for start in range(first, last, size)]
    spare = [run(slice(0, 1))[0][:, :0].sum() for _ in range(least_chunks - len(parts))]
    if not parts:
        zeros = hidden_states.new_zeros(needed.shape, dtype=dtype)
        # In the graph, so that every process has a backward pass.
        return zeros + sum(spare, hidden_states[..., :0].sum()), zeros
    margin = (first, needed.shape[1] - last)
    differentiable, other = (
        torch.nn.functional.pad(torch.cat(part, dim=1), margin).masked_fill(~needed, 0) for part in zip(*parts)
    )
    return sum(spare, differentiable), other
