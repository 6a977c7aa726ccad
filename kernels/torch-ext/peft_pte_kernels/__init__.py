"""Fused Triton kernels of Progressive Thought Encoding, each with its plain PyTorch form.

Every function takes the Triton kernel or the PyTorch form of `reference.py`, as the environment variable `PTE_KERNELS`
says (see `dispatch.py`); both are differentiable where a gradient is defined. Arguments that do not fit together are
refused by either (`checks.py`).
"""

from __future__ import annotations

import torch

from . import checks, reference
from .dispatch import HAS_TRITON, can_skip_dispatcher, uses_triton
from .reference import Rotation

if HAS_TRITON:
    from .ops import attention as attention_ops
    from .ops import cache as cache_ops
    from .ops import encode as encode_ops
    from .ops import logprobs as logprobs_ops
    from .ops import low_rank as low_rank_ops
    from .ops import state as state_ops


def encode(
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    key_weights: list[torch.Tensor],
    value_weights: list[torch.Tensor],
    cores: torch.Tensor,
    update: str,
    rotation: Rotation | None = None,
    valid: torch.Tensor | None = None,
    taps: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Write what leaves the cache into the cores of all layers; see `reference.encode`."""
    checks.encode(keys, values, key_weights, value_weights, cores, update, rotation, valid, taps)
    some = keys[0], values[0], key_weights[0], value_weights[0], cores, *(taps or [])[:1]
    if uses_triton(*some, rank=cores.shape[-1]):
        cos, sin, interleaved = (None, None, False) if rotation is None else rotation
        return encode_ops.encode_cores_op(
            keys, values, key_weights, value_weights, cores, update == "delta", cos, sin, interleaved, valid, taps or []
        )
    return reference.encode(keys, values, key_weights, value_weights, cores, update, rotation, valid, taps)


def read_state(
    cores: torch.Tensor, query: torch.Tensor, initial: torch.Tensor, transposed: bool, norm: str
) -> torch.Tensor:
    """The states that projections use; see `reference.read_state`."""
    checks.read_state(cores, query, initial, norm)
    if uses_triton(cores, query, initial, rank=cores.shape[-1]):
        return state_ops.read_states_op(cores, query, initial, transposed, norm)
    return reference.read_state(cores, query, initial, transposed, norm)


def compact(slots: list[torch.Tensor], start: int, count: int, length: int) -> None:
    """Close the gap that evicted slots leave, in place; see `reference.compact`."""
    checks.compact(slots, start, count, length)
    if not slots:
        return
    if uses_triton(slots[0]):
        cache_ops.compact_op(slots, start, count, length)
    else:
        reference.compact(slots, start, count, length)


def low_rank_update(
    x: torch.Tensor,
    bases: list[torch.Tensor],
    state: torch.Tensor,
    A: list[torch.Tensor],
    B: list[torch.Tensor],
    scaling: float,
    gate: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """y + scaling * A S B x for up to three projections of one input; see `reference.low_rank_update`."""
    checks.low_rank_update(x, bases, state, A, B, gate)
    shrinking = B if gate is None else [*B, gate]
    if uses_triton(x, *bases, *A, *shrinking, state, rank=state.shape[-1]):
        op = low_rank_ops.low_rank if can_skip_dispatcher() else low_rank_ops.low_rank_op
        return op(x, bases, state, A, shrinking, scaling)[:-1]
    return reference.low_rank_update(x, bases, state, A, B, scaling, gate)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of one new token over the slots in use, without a gradient; see `reference.decode_attention`."""
    checks.decode_attention(query, keys, values, first, length)
    if uses_triton(query, keys, values):
        return attention_ops.decode_attention_op(query, keys, values, first, length, scaling)
    return reference.decode_attention(query, keys, values, first, length, scaling)


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` and the entropy, in one pass; see `reference.token_logprobs`."""
    checks.token_logprobs(logits, targets, temperature)
    if uses_triton(logits):
        logprob, entropy, _ = logprobs_ops.logprobs_op(logits, targets, temperature)
        return logprob, entropy
    return reference.token_logprobs(logits, targets, temperature)
