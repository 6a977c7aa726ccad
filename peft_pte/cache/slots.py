"""Storage for cache slots: constant in size once the window is full."""

from __future__ import annotations

import torch


class SlotBuffer:
    """A tensor [B, H, slots, D] that grows by appending and shrinks by evicting, in place where autograd allows.

    The storage grows in steps up to `limit` slots (prefix + window) and then stays, so that memory is constant.
    """

    GROWTH = 256

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.length = 0

    @property
    def view(self) -> torch.Tensor:
        """The slots in use, [B, H, length, D]."""
        return self.data.narrow(-2, 0, self.length)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.numel() * self.data.element_size()

    def must_copy(self, *new: torch.Tensor) -> bool:
        # Autograd keeps references to what was returned, and inference tensors cannot be written to outside of
        # inference mode: both need new storage instead of a write.
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (self.data, *new))
        return tracked or (self.data.is_inference() and not torch.is_inference_mode_enabled())

    def reserve(self, capacity: int) -> torch.Tensor:
        """Make room for `capacity` slots at once; returns the storage [B, H, capacity or more, D]."""
        if self.data.shape[-2] < capacity or self.must_copy():
            grown = self.data.new_empty((*self.data.shape[:-2], capacity, self.data.shape[-1]))
            grown[..., : self.length, :] = self.view
            self.data = grown
        return self.data

    def append(self, new: torch.Tensor, limit: int) -> torch.Tensor:
        """Append `new` [B, H, q, D]; returns all slots in use."""
        length = self.length + new.shape[-2]
        if self.data is None:
            self.data = new.new_empty((*new.shape[:-2], 0, new.shape[-1]))
        if self.must_copy(new):
            self.data = torch.cat([self.view, new], dim=-2)
        else:
            if length > self.data.shape[-2]:
                capacity = max(length, min(length + self.GROWTH, limit))
                grown = new.new_empty((*new.shape[:-2], capacity, new.shape[-1]))
                grown[..., : self.length, :] = self.view
                self.data = grown
            self.data[..., self.length : length, :] = new
        self.length = length
        return self.view

    def take(self, start: int, count: int) -> torch.Tensor:
        """Remove and return `count` slots from `start` on; later slots move up."""
        taken = self.view.narrow(-2, start, count).clone()
        rest = self.view.narrow(-2, start + count, self.length - start - count)
        if self.must_copy():
            self.data = torch.cat([self.view.narrow(-2, 0, start), rest], dim=-2)
        else:
            self.data[..., start : self.length - count, :] = rest.clone()
        self.length -= count
        return taken

    def take_rows(self, taken: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The same with a slot index for each row: `taken` [B, m] leave, `kept` [B, length'] stay, in this order."""
        gone, rest = self.gather(taken), self.gather(kept)
        if self.must_copy():
            self.data = rest
        else:
            self.data[..., : rest.shape[-2], :] = rest
        self.length = kept.shape[1]
        return gone

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Slots by row, `index` [B, m] -> [B, H, m, D]."""
        index = index.to(self.data.device)[:, None, :, None]
        return self.view.gather(-2, index.expand(-1, self.data.shape[1], -1, self.data.shape[-1]))

    def select(self, index: torch.Tensor) -> None:
        """Select rows of the batch."""
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))
