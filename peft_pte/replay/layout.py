"""How the caller's columns are moved so that one schedule holds for all rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compiling import uncompiled
from ..config import CachePolicy


@dataclass
class Layout:
    """How the caller's columns are moved so that evictions come at the same column in all rows.

    The tokens of a row are moved together, wherever there is padding, since padding fills no window. With
    `retained_prefix="prompt"` prompts are aligned at their ends; with an integer prefix rows are aligned at their first
    token.
    """

    prefix: int  # retained columns
    window: int
    given: torch.Tensor  # [B, T], True where the caller has a token
    valid: torch.Tensor  # [B, T'], True where there is a token
    source: torch.Tensor | None  # [B, T'] caller's columns, None: columns stay where they are
    target: torch.Tensor | None  # [B, T] where the caller's columns have gone

    @classmethod
    @uncompiled
    def create(cls, valid: torch.Tensor, border: torch.Tensor | None, policy: CachePolicy) -> Layout:
        """`valid` [B, T] bool; `border` [B]: the caller's column of each row's first thought.

        Several of its numbers are read by the host, which waits for them if these tensors are on a GPU.
        """
        border = None if border is None else border.to(valid.device)
        columns = torch.arange(valid.shape[1], device=valid.device)
        rank = valid.cumsum(-1)  # of every token in its row, from 1 on
        total = rank[:, -1:]
        if policy.retained_prefix != "prompt":
            prefix, shift = policy.retained_prefix, torch.zeros_like(total)
        elif border is not None:
            num_prompt = (valid & (columns < border[:, None])).sum(-1, keepdim=True)
            prefix = int(num_prompt.max())
            shift = prefix - num_prompt
        else:
            raise ValueError("With `retained_prefix='prompt'` the border must be known.")
        window = policy.window(prefix)
        length = int((shift + total).max())
        is_whole = bool((valid | (rank == 0) | (rank == total)).all())  # no padding between tokens
        if is_whole and length - prefix <= window:  # nothing is evicted, wherever the columns are
            return cls(valid.shape[1], window, valid, valid, None, None)
        target = rank - 1 + shift
        if bool(((target == columns) | ~valid).all()):
            return cls(prefix, window, valid, valid[:, :length], None, None)
        ranks = torch.arange(1, length + 1, device=valid.device) - shift
        source = torch.searchsorted(rank, ranks).clamp(max=valid.shape[1] - 1)
        return cls(prefix, window, valid, (ranks >= 1) & (ranks <= total), source, target.clamp(0, length - 1))

    @uncompiled
    def to(self, device: torch.device) -> Layout:
        """On `device`. Masks without padding are made there, since a copy from the host can be in no CUDA graph."""

        def moved(mask: torch.Tensor) -> torch.Tensor:
            if mask.device.type == "cpu" != device.type and bool(mask.all()):
                return torch.ones(mask.shape, dtype=torch.bool, device=device)
            return mask.to(device)

        source, target = (None if x is None else x.to(device) for x in (self.source, self.target))
        return replace(self, given=moved(self.given), valid=moved(self.valid), source=source, target=target)

    @uncompiled
    def place(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] in the caller's columns -> [B, T', ...]."""
        return x[:, : self.valid.shape[1]] if self.source is None else gathered(x, self.source)

    def after_eviction(self) -> torch.Tensor:
        """The caller's columns [B, T] (bool) that are computed when thoughts have left."""
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        return self.restore((columns >= self.prefix + self.window).expand(self.valid.shape[0], -1))

    @uncompiled
    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T', ...] -> [B, T, ...] in the caller's columns; on padding zero, or whatever was computed for it."""
        if self.target is not None:
            return gathered(x, self.target).masked_fill(~self.given.view(*self.given.shape, *[1] * (x.ndim - 2)), 0)
        missing = self.given.shape[1] - x.shape[1]
        return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1) if missing else x


def gathered(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Of `x` [B, T, ...] the columns [B, T'] of each row: [B, T', ...]. `x` may be in host memory, and stays there."""
    index = columns.to(x.device).view(*columns.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def checked_lengths(prompt_lengths: Any, batch_size: int, most: int | None) -> torch.Tensor:
    """`prompt_lengths` as a tensor [B], where they are; with a cache counted from the first column that it has seen."""
    border = torch.as_tensor(prompt_lengths)
    border = border.expand(batch_size) if border.ndim == 0 else border
    fits = border.shape == (batch_size,) and not border.is_floating_point()
    if not fits or not bool(((border >= 0) & (border <= (border if most is None else most))).all()):
        wanted = "one integer >= 0" if most is None else f"one integer in [0, {most}]"
        raise ValueError(
            f"`prompt_lengths` must hold {wanted} for each of the {batch_size} rows (the column at which the "
            f"completion begins, padding counted), got {prompt_lengths!r}."
        )
    return border.long()
