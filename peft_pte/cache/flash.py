"""`flash_attn_with_kvcache` for the captured step, where flash-attn is installed; elsewhere our own kernel.

A library that is well kept, and faster with many rows: it too reads on the device how many slots are in use, and which
is the first of each row, so that its launches can be captured in a CUDA graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from peft_pte_kernels import dispatch


def find() -> Callable[..., Any] | None:
    """The function of FlashAttention 3 or 2, None if neither is there or can be loaded."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            return importlib.import_module(name).flash_attn_with_kvcache
        except (ImportError, AttributeError, OSError):  # OSError: built for another torch
            continue
    return None


FLASH: Any = find() if torch.cuda.is_available() else None


def can_attend(query: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether it computes this attention: `query` [B, H_q, 1, D], `keys` [B, H, capacity, D]."""
    return (
        FLASH is not None
        and dispatch.MODE == "auto"  # PTE_KERNELS asks for our kernels, or for none
        and query.is_cuda
        and not torch.version.hip
        and query.dtype in (torch.float16, torch.bfloat16)
        and keys.dtype == query.dtype
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """As `peft_pte_kernels.decode_attention`: slots `first[b] <= slot < length` are seen; [B, H_q, 1, D]."""
    result = FLASH(
        *(x.transpose(1, 2) for x in (query, keys, values)),
        cache_seqlens=length.expand(query.shape[0]).contiguous(),  # counted from slot 0, not from the row's first
        cache_leftpad=first,
        softmax_scale=scaling,
    )
    result = result[0] if isinstance(result, tuple) else result
    return result.transpose(1, 2)
