"""Takes the rotary position out of cached keys, with the family's own rotation."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from peft_pte_kernels import Rotation

Rotate = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # (q, k, cos, sin) -> (q, k)


def find_rotation(attention: nn.Module) -> Rotate | None:
    """The `apply_rotary_pos_emb` that this attention module uses, if its modeling file has one."""
    for cls in type(attention).__mro__:  # FSDP2 puts a class of its own in front
        rotation = getattr(sys.modules[cls.__module__], "apply_rotary_pos_emb", None)
        if rotation is not None:
            return rotation
    return None


def rotation_of(attention: nn.Module) -> Rotate:
    """As `find_rotation`, for a module that has one (`find_decoder` refuses others)."""
    rotation = find_rotation(attention)
    if rotation is None:
        raise TypeError(f"The modeling file of {type(attention).__name__} has no `apply_rotary_pos_emb`.")
    return rotation


# How a family rotates: whether pairs are neighbours, and which columns of its tables hold one angle of each pair.
Style = tuple[bool, slice]
# What `style_of` has found out, by the rotation and the class of the rotary embedding.
STYLES: dict[tuple[Rotate, type], Style | None] = {}


@torch.no_grad()
def style_of(rotation: Rotate, rotary_emb: nn.Module, device: torch.device) -> Style | None:
    """How this function rotates with the tables of this module, found by trying; None if as none of the known ones."""
    key = (rotation, type(rotary_emb))
    if key not in STYLES:
        positions = torch.arange(1, 4, device=device)[None]
        tables = rotary_emb(torch.empty(0, dtype=torch.float64, device=device), position_ids=positions)
        rotary_dim = tables[0].shape[-1]
        keys = torch.linspace(-1, 1, 3 * rotary_dim, dtype=torch.float64, device=device).view(1, 1, 3, rotary_dim)
        expected = rotation(keys, keys, *tables)[1]
        first_half, every_other = slice(0, rotary_dim // 2), slice(0, None, 2)
        STYLES[key] = None
        for style in ((False, first_half), (True, first_half), (True, every_other)):
            cos, sin = (table[..., style[1]] for table in tables)
            if torch.allclose(Rotation(cos, sin, style[0]).apply(keys), expected, atol=1e-5):
                STYLES[key] = style
                break
    return STYLES[key]


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
            # Its `forward`, without hooks: ZeRO-3 would note a call that segments without an eviction do not make.
            x = torch.empty(0, dtype=dtype, device=positions.device)
            cos, sin = self.rotary_emb.forward(x, position_ids=positions)
            # A cached key is c R k with c the family's attention scaling (1 except for YaRN and the like), and the
            # tables carry c too; (1/c) R^T undoes it.
            scaling = float(getattr(self.rotary_emb, "attention_scaling", 1.0)) ** 2
            self._tables[encode_keys, dtype] = (cos / scaling, -sin / scaling)
        return self._tables[encode_keys, dtype]

    def rotation(self, attention: nn.Module, encode_keys: str) -> Rotation | None:
        """What `take_out` does, for kernels: None if it does nothing.

        Raises:
            LookupError: the family's rotation is of no known style.
        """
        if not self._rotates(attention, encode_keys):
            return None
        style = style_of(rotation_of(attention), self.rotary_emb, self.positions.device)
        if style is None:
            raise LookupError(f"{type(attention).__name__} rotates in a way of its own.")
        interleaved, columns = style
        cos, sin = self._inverse_tables(encode_keys, torch.float32)
        return Rotation(cos[..., columns], sin[..., columns], interleaved)

    @staticmethod
    def _rotates(attention: nn.Module, encode_keys: str) -> bool:
        return encode_keys != "post_rope" and getattr(attention, "use_rope", True)  # SmolLM3: layers without RoPE

    def take_out(self, attention: nn.Module, keys: torch.Tensor, encode_keys: str) -> torch.Tensor:
        """Rotate cached `keys` [B, H_kv, m, head_dim] (float32 or float64) back.

        `"pre_rope"`: every key to position 0; `"chunk"`: all by the position of the chunk's first token, so that the
        order inside the chunk stays; `"post_rope"`: not at all.
        """
        if not self._rotates(attention, encode_keys):
            return keys
        cos, sin = self._inverse_tables(encode_keys, keys.dtype)
        cos, sin = cos.to(keys.device), sin.to(keys.device)
        rotary_dim = cos.shape[-1]  # the rest of a head has no position, in families with partial rotation
        rotated = keys[..., :rotary_dim]
        rotated = rotation_of(attention)(rotated, rotated, cos, sin)[1]
        return torch.cat([rotated, keys[..., rotary_dim:]], dim=-1)
