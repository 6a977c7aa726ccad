"""Rows of a batch that are not in lockstep: what their slots hold, what leaves, and where the rest goes.

Rows get there by padding: between tokens (a turn of several lengths in one batch), or in front of an integer prefix.
Padding fills no window, so such rows are full at different times. Every row's tokens end at the last slot, because all
rows store their next token in the same one; in front of them are empty slots. All of it is counted on the device, and
read by the host when room has to be made, not at every step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .schedule import Schedule

EMPTY = -1  # the column of a slot that holds none


def slack(window: int) -> int:
    """How many slots more than prefix and window there are.

    Slots that are empty in all rows are given back when there are no others, at the price of moving everything. Few
    spare slots mean many moves, many mean attention to slots that hold nothing; this is where both cost the same.
    """
    return 2 * math.isqrt(window)


def visible(mask: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The caller's mask [B, T] of what slots hold: [B, S]. `columns` [B, S] are the caller's, or `EMPTY`."""
    return mask.gather(1, columns.clamp(min=0)).masked_fill_(columns < 0, 0)


class Move(NamedTuple):
    """Slot `index[i, t]` of row `rows[i]` (None: of every row) goes to slot t; slots beyond the index stay.

    `empty`: new slots that hold no token.
    """

    rows: torch.Tensor | None
    index: torch.Tensor
    empty: torch.Tensor


class Tally:
    """The tokens in the slots of all rows, and which of them leave before the next column is stored.

    Args:
        held: [B, S], whether a slot holds a token. kept: [B], how many tokens of a row are never evicted.
        coming: [B, q], whether the next columns bring a token. A row that waits evicts nothing.
        schedule: of the cache.
    """

    def __init__(self, held: torch.Tensor, kept: torch.Tensor, coming: torch.Tensor, schedule: Schedule):
        self.held, self.kept = held, kept
        self.window, self.num_evicted = schedule.window, schedule.num_evicted
        self.num_slots = held.shape[1]
        self.rank = held.cumsum(-1)  # of every token in its row, from 1 on
        totals, spans = self.rank[:, -1], (self.rank > 0).sum(-1)
        thoughts = totals - kept
        self.is_full = schedule.is_full(thoughts) & coming[:, 0]
        room = schedule.room(thoughts - self.num_evicted * self.is_full)
        coming = coming.cumsum(-1)
        # Columns with at most as many tokens as there is room for, and as many more as would fill it for sure.
        columns = (coming <= room[:, None]).sum(-1) + (room - coming[:, -1]).clamp(min=0)
        # The one time that the host waits for the device.
        self.full, self.totals, self.thoughts, spans, columns = torch.stack(
            [self.is_full, totals, thoughts, spans, columns]
        ).tolist()
        self.has_gaps = [total < span for total, span in zip(self.totals, spans)]
        self.columns = min(columns)  # that can be stored when these thoughts have left, until a row is full

    def common_start(self) -> int | None:
        """The slot of the first thought, if all rows are full, have it there, and have no empty slots behind it."""
        (start, *others) = {self.num_slots - thoughts for thoughts in self.thoughts}
        return start if all(self.full) and not others and not any(self.has_gaps) else None

    def leaving(self) -> torch.Tensor:
        """The slots [B, n] of the oldest thoughts of rows that are full; for others, any."""
        ranks = self.kept[:, None] + torch.arange(1, self.num_evicted + 1, device=self.rank.device)
        return torch.searchsorted(self.rank, ranks).clamp(max=self.num_slots - 1)

    def remaining(self) -> list[int]:
        """Tokens in each row when the oldest thoughts of full rows have left."""
        return [total - self.num_evicted * is_full for total, is_full in zip(self.totals, self.full)]

    def move(self, num_slots: int) -> Move | None:
        """How the tokens that remain come to the ends of `num_slots` slots, in their order; None: they are there."""
        kept = self.kept[:, None]
        gone = self.is_full[:, None] & (self.rank > kept) & (self.rank <= kept + self.num_evicted)
        stay = (self.held & ~gone).cumsum(-1)
        rows, width = None, num_slots
        if num_slots == self.num_slots:  # only in some rows something changes, and there only up to what has left
            moved = [row for row, changes in enumerate(zip(self.full, self.has_gaps)) if any(changes)]
            if not moved:
                return None
            ends = [self.num_slots - self.thoughts[row] + self.num_evicted for row in moved if not self.has_gaps[row]]
            width = max(ends) if len(ends) == len(moved) else num_slots
            if len(moved) < len(self.full):
                rows = torch.tensor(moved, device=stay.device)
                stay = stay.index_select(0, rows)
        slots = torch.arange(width, device=stay.device)
        ranks = slots + 1 + stay[:, -1:] - num_slots
        empty = ranks < 1
        return Move(rows, torch.searchsorted(stay, ranks).masked_fill_(empty, 0), empty)
