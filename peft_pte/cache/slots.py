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
    def storage(self) -> torch.Tensor:
        """All slots, [B, H, length or more, D], once something was stored."""
        if self.data is None:
            raise RuntimeError("Nothing was stored yet.")
        return self.data

    @property
    def view(self) -> torch.Tensor:
        """The slots in use, [B, H, length, D]."""
        return self.storage.narrow(-2, 0, self.length)

    @property
    def nbytes(self) -> int:
        return 0 if self.data is None else self.data.numel() * self.data.element_size()

    def must_copy(self, *new: torch.Tensor) -> bool:
        # Autograd keeps references to what was returned, and inference tensors cannot be written to outside of
        # inference mode: both need new storage instead of a write.
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (self.storage, *new))
        return tracked or (self.storage.is_inference() and not torch.is_inference_mode_enabled())

    def reserve(self, capacity: int) -> torch.Tensor:
        """Make room for `capacity` slots at once; returns the storage [B, H, capacity or more, D]."""
        storage = self.storage
        if storage.shape[-2] < capacity or self.must_copy():
            grown = storage.new_empty((*storage.shape[:-2], capacity, storage.shape[-1]))
            grown[..., : self.length, :] = self.view
            self.data = storage = grown
        return storage

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
            self.storage[..., start : self.length - count, :] = rest.clone()
        self.length -= count
        return taken

    def rearrange(self, index: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Slot `index[i, t]` of row `rows[i]` goes to slot t, all others stay.

        Without `rows`: the same for every row, and there are no other slots.
        """
        if rows is None:
            moved = self.gather(index)
            if self.must_copy():
                self.data = moved
            else:
                self.storage[..., : index.shape[1], :] = moved
            self.length = index.shape[1]
            return
        rows = rows.to(self.storage.device)
        part = self.storage.narrow(-2, 0, index.shape[1])
        moved = gathered(part.index_select(0, rows), index)
        if self.must_copy():
            rest = self.view[..., index.shape[1] :, :]
            self.data = torch.cat([part.index_copy(0, rows, moved), rest], dim=-2)
        else:
            part.index_copy_(0, rows, moved)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """Slots by row, `index` [B, m] -> [B, H, m, D]."""
        return gathered(self.view, index)

    def select(self, index: torch.Tensor) -> None:
        """Select rows of the batch."""
        if self.data is not None:
            self.data = self.data.index_select(0, index.to(self.data.device))


def gathered(slots: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of `slots` [B, H, S, D] those of `index` [B, m]: [B, H, m, D]."""
    index = index.to(slots.device)[:, None, :, None]
    return slots.gather(-2, index.expand(-1, slots.shape[1], -1, slots.shape[-1]))
