"""Takes the rotary position out of cached keys, with the family's own rotation."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn


def rotation_of(attention: nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The `apply_rotary_pos_emb(q, k, cos, sin)` that this attention module uses, if its modeling file has one."""
    for cls in type(attention).__mro__:  # FSDP2 puts a class of its own in front
        rotation = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if rotation is not None:
            return rotation
    return None


class KeyPositions:
    """Positions of evicted tokens, and how to take them out of the cached keys; shared by all layers of an eviction.

    Args:
        rotary_emb: the decoder's rotary embedding, `(x, position_ids) -> (cos, sin)`.
        positions: [B, m], int64, absolute.
    """

    def __init__(self, rotary_emb: nn.Module, positions: torch.Tensor):
        self.rotary_emb = rotary_emb
        self.positions = positions
        self._tables: dict[tuple[str, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def _inverse_tables(self, encode_keys: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        if (encode_keys, dtype) not in self._tables:
            positions = self.positions if encode_keys == "pre_rope" else self.positions[:, :1]
            cos, sin = self.rotary_emb(torch.empty(0, dtype=dtype, device=positions.device), position_ids=positions)
            # A cached key is c R k with c the family's attention scaling (1 except for YaRN and the like), and the
            # tables carry c too; (1/c) R^T undoes it.
            scaling = float(getattr(self.rotary_emb, "attention_scaling", 1.0)) ** 2
            self._tables[encode_keys, dtype] = (cos / scaling, -sin / scaling)
        return self._tables[encode_keys, dtype]

    def take_out(self, attention: nn.Module, keys: torch.Tensor, encode_keys: str) -> torch.Tensor:
        """Rotate cached `keys` [B, H_kv, m, head_dim] (float32 or float64) back.

        `"pre_rope"`: every key to position 0; `"chunk"`: all by the position of the chunk's first token, so that the
        order inside the chunk stays; `"post_rope"`: not at all.
        """
        if encode_keys == "post_rope" or not getattr(attention, "use_rope", True):  # SmolLM3 has layers without RoPE
            return keys
        cos, sin = self._inverse_tables(encode_keys, keys.dtype)
        cos, sin = cos.to(keys.device), sin.to(keys.device)
        rotary_dim = cos.shape[-1]  # the rest of a head has no position, in families with partial rotation
        rotated = keys[..., :rotary_dim]
        rotated = rotation_of(attention)(rotated, rotated, cos, sin)[1]
        return torch.cat([rotated, keys[..., rotary_dim:]], dim=-1)
