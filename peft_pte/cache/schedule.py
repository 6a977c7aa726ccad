"""When evictions happen: the one definition that decoding and training both ask."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

Count = TypeVar("Count", int, torch.Tensor)  # of one row, or of each


class Segment(NamedTuple):
    """Columns `[start, end)` that are computed with one and the same state.

    `evict`: an eviction comes before it; `num_evicted`: thoughts that have left by then, including those of this one.
    """

    start: int
    end: int
    evict: bool
    num_evicted: int


def stored_columns(mask: torch.Tensor, prefix: int, num_evicted: int, end: int) -> torch.Tensor:
    """Of the columns before `end` of `mask` [B, T] those that are stored: the prefix, and thoughts not yet evicted."""
    return torch.cat([mask[:, : min(prefix, end)], mask[:, prefix + num_evicted : end]], dim=1)


@dataclass(frozen=True)
class Schedule:
    """Before a step that would store more than `window` thoughts, the `num_evicted` oldest leave.

    So with thoughts counted from 0 after the retained prefix, evictions come before thoughts C, C + n, C + 2n, ...
    whatever the number of tokens a call brings.
    """

    window: int
    num_evicted: int

    @classmethod
    def create(cls, window: int, eviction_ratio: float) -> Schedule:
        """C thoughts stay, `max(1, floor(C * eviction_ratio))` leave at once."""
        # 1e-9: 0.29 * 100 is 28.999999999999996 in floating point.
        return cls(window, max(1, math.floor(window * eviction_ratio + 1e-9)))

    def is_full(self, num_thoughts: Count) -> bool | torch.Tensor:
        """Whether an eviction comes before the next thought is stored; negative counts: the prefix is incomplete."""
        return num_thoughts >= self.window

    def room(self, num_thoughts: Count) -> Count:
        """How many tokens can be stored before the next eviction."""
        return self.window - num_thoughts

    def num_evictions(self, num_thoughts: int) -> int:
        """How often thoughts have left when so many have been stored, before the next one comes."""
        return max(0, -((self.window - num_thoughts) // self.num_evicted))

    def num_gone(self, num_thoughts: int) -> int:
        """How many thoughts have left by then."""
        return self.num_evicted * self.num_evictions(num_thoughts)

    def segments(self, prefix: int, length: int, longest: int | None = None, start: int = 0) -> Iterator[Segment]:
        """Split `length` columns, of which the first `prefix` are kept for ever, at the evictions.

        `longest`: split further, so that no segment is longer; the state is constant between evictions. `start`: the
        columns before it have been computed, with all evictions that come before them.
        """
        num_evicted = self.num_gone(start - prefix)
        num_thoughts = start - prefix - num_evicted
        while start < length:
            evict = self.is_full(num_thoughts)
            if evict:
                num_thoughts -= self.num_evicted
                num_evicted += self.num_evicted
            end = min(length, start + self.room(num_thoughts), start + (longest or length))
            yield Segment(start, end, evict, num_evicted)
            num_thoughts += end - start
            start = end
