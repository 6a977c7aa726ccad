"""How the caller's columns are moved so that one schedule holds for all rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..compiling import uncompiled
from ..config import CachePolicy


@dataclass
class Layout:
    """How the caller's columns are moved so that evictions come at the same column in all rows.

    Row b's column c holds the caller's column `c + offset[b]`. With `retained_prefix="prompt"` prompts are aligned at
    their ends; with an integer prefix rows are aligned at their first token.
    """

    prefix: int  # retained columns
    window: int
    offset: torch.Tensor  # [B]
    valid: torch.Tensor  # [B, T'], True where there is a token
    source: torch.Tensor | None  # [B, T'] caller's columns, None: columns stay where they are

    @classmethod
    @uncompiled
    def create(cls, valid: torch.Tensor, border: torch.Tensor | None, policy: CachePolicy) -> Layout:
        """`valid` [B, T] bool; `border` [B]: the caller's column of each row's first thought."""
        batch_size, length = valid.shape
        columns = torch.arange(length, device=valid.device)
        start = torch.where(valid, columns, length).amin(-1).clamp(max=length - 1)
        end = torch.where(valid, columns + 1, 0).amax(-1)
        if policy.retained_prefix == "prompt":
            border = torch.maximum(border, start)
            prefix = int((border - start).max())
            first_thought, offset = border, border - prefix
        else:
            prefix = policy.retained_prefix
            first_thought, offset = start + prefix, start
        window = policy.window_size
        if window == "prompt":
            window = max(1, int((valid & (columns < border[:, None])).sum(-1).max()))
        num_thoughts = int((end - first_thought).max())
        if num_thoughts <= window:  # nothing is evicted, wherever the columns are
            return cls(length, window, torch.zeros_like(start), valid, None)
        if not bool((offset == 0).all()):
            source = torch.arange(prefix + num_thoughts, device=valid.device) + offset[:, None]
            inside = (source >= 0) & (source < length)
            source = source.clamp(0, length - 1)
            return cls(prefix, window, offset, valid.gather(1, source) & inside, source)
        return cls(prefix, window, offset, valid[:, : prefix + num_thoughts], None)

    @uncompiled
    def place(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] in the caller's columns -> [B, T', ...]."""
        if self.source is None:
            return x[:, : self.valid.shape[1]]
        index = self.source.view(*self.source.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    @uncompiled
    def restore(self, x: torch.Tensor, length: int) -> torch.Tensor:
        """[B, T', ...] -> [B, T, ...] in the caller's columns, zero where nothing was computed (padding)."""
        if self.source is None and x.shape[1] == length:
            return x
        index = torch.arange(length, device=x.device)[None] - self.offset[:, None]
        inside = (index >= 0) & (index < x.shape[1])
        shape = (*index.shape, *[1] * (x.ndim - 2))
        x = x.gather(1, index.clamp(0, x.shape[1] - 1).view(shape).expand(-1, -1, *x.shape[2:]))
        return x.masked_fill(~inside.view(shape), 0)
