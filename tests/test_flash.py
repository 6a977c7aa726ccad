"""flash-attn's attention over slots takes the place of ours in the captured step, with the same meaning."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from peft_pte.cache import flash
from peft_pte_kernels import dispatch, reference


def documented(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    **others: Any,
) -> torch.Tensor:
    """What flash-attn's own tests compare it with: columns from `cache_leftpad` on and before `cache_seqlens` are seen.

    `q` [B, 1, H_q, D], caches [B, capacity, H, D]; lengths int32 [B], contiguous.
    """
    assert not others
    for lengths in (cache_seqlens, cache_leftpad):
        assert lengths.shape == q.shape[:1] and lengths.dtype == torch.int32 and lengths.is_contiguous()
    assert all(x.stride(-1) == 1 for x in (q, k_cache, v_cache))
    groups = q.shape[2] // k_cache.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2).float() for x in (k_cache, v_cache))
    columns = torch.arange(k.shape[1])
    seen = (columns >= cache_leftpad[:, None]) & (columns < cache_seqlens[:, None])
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * softmax_scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_same_meaning_as_ours(monkeypatch: pytest.MonkeyPatch, returns_tuple: bool) -> None:
    function = (lambda *args, **kwargs: (documented(*args, **kwargs), None)) if returns_tuple else documented
    monkeypatch.setattr(flash, "FLASH", function)
    torch.manual_seed(0)
    query, keys, values = (
        torch.randn(3, heads, n, 16, dtype=torch.bfloat16) for heads, n in ((4, 1), (2, 40), (2, 40))
    )
    first, length = torch.tensor([0, 5, 20], dtype=torch.int32), torch.tensor([33], dtype=torch.int32)
    arguments = query, keys, values, first, length, 0.3
    actual, expected = flash.decode_attention(*arguments), reference.decode_attention(*arguments)
    assert actual.shape == expected.shape and actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-2)


class OnGPU:
    """What is asked of a tensor, as on a GPU."""

    is_cuda, device = True, "cuda"

    def __init__(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128):
        self.dtype, self.shape = dtype, (1, 2, 8, head_dim)


@pytest.mark.parametrize(
    "query, keys, capability, mode, expected",
    [
        (OnGPU(), OnGPU(), (9, 0), "auto", True),
        (OnGPU(), OnGPU(), (8, 0), "auto", True),
        (OnGPU(), OnGPU(), (7, 5), "auto", False),
        (OnGPU(torch.float32), OnGPU(torch.float32), (9, 0), "auto", False),
        (OnGPU(), OnGPU(torch.float16), (9, 0), "auto", False),
        (OnGPU(head_dim=512), OnGPU(head_dim=512), (9, 0), "auto", False),
        (OnGPU(head_dim=20), OnGPU(head_dim=20), (9, 0), "auto", False),
        (OnGPU(), OnGPU(), (9, 0), "triton", False),
        (OnGPU(), OnGPU(), (9, 0), "torch", False),
    ],
)
def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch, query, keys, capability, mode: str, expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "MODE", mode)
    monkeypatch.setattr(flash, "FLASH", None)
    assert not flash.can_attend(query, keys)  # not installed
    monkeypatch.setattr(flash, "FLASH", documented)
    assert flash.can_attend(query, keys) == expected


def test_newest_first_and_broken_ones_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_interface", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)
    assert flash.find() is None
    older, newer = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    older.flash_attn_with_kvcache = documented
    monkeypatch.setitem(sys.modules, "flash_attn", older)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", newer)  # without the function
    assert flash.find() is documented
    newer.flash_attn_with_kvcache = print
    assert flash.find() is print
