"""What a step of the engine computes: its tokens, cut at the evictions of the sequence that they belong to.

All follows from how many tokens of a sequence were computed before and how long its prompt is, so that nothing is
counted along: a sequence that starts again, or comes in other chunks, has its evictions where they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..cache.schedule import Schedule
from ..config import CachePolicy
from ..rotary import KeyPositions


class Part(NamedTuple):
    """One sequence's share of a step.

    Args:
        page: where its state lies. start, end: its tokens among those of the step. seen: tokens computed before.
        prompt_length: of its request, also if that starts again with what it has generated.
    """

    page: int
    start: int
    end: int
    seen: int
    prompt_length: int


@dataclass
class Row:
    """A sequence when its next tokens come.

    Args:
        page: where its state lies. is_new: nothing of it was computed.
        stored: slots in use, when what has to leave has left. prefix: slots that are never evicted.
        leaving: thoughts that leave before. gone: those that left earlier.
        positions: of what leaves, for all layers; the first one makes it.
    """

    page: int
    is_new: bool
    stored: int
    prefix: int
    leaving: int
    gone: int
    positions: KeyPositions | None = None


class Piece(NamedTuple):
    """Tokens that are computed together: of each row as many, with one state.

    `tokens`: which ones of the step, rows one after another. `pages`: of the rows. Both int64 on the device.
    """

    tokens: torch.Tensor
    pages: torch.Tensor
    rows: list[Row]


@functools.lru_cache
def schedule_of(policy: CachePolicy, prompt_length: int) -> Schedule:
    """The schedule of one request; with `window_size="prompt"` it counts as a batch of its own."""
    return Schedule.create(policy.window(prompt_length), policy.eviction_ratio)


def num_slots(policy: CachePolicy, max_prompt_length: int) -> int:
    """Slots that a sequence with the longest prompt uses at most."""
    return policy.prefix(max_prompt_length) + policy.window(max_prompt_length)


def plan(parts: Iterable[Part], policy: CachePolicy, device: torch.device) -> list[Piece]:
    """The pieces of a step, in an order in which they can be computed.

    Single tokens of all sequences are one piece, and every segment of longer parts is one.
    """
    single: tuple[list[int], list[Row]] = [], []
    longer: list[tuple[list[int], list[Row]]] = []
    for part in parts:
        schedule = schedule_of(policy, part.prompt_length)
        prefix, length = policy.prefix(part.prompt_length), part.seen + part.end - part.start
        offset = part.start - part.seen
        for segment in schedule.segments(prefix, length, start=part.seen):
            leaving = schedule.num_evicted if segment.evict else 0
            row = Row(
                page=part.page,
                is_new=segment.start == 0,
                stored=segment.start - segment.num_evicted,
                prefix=prefix,
                leaving=leaving,
                gone=segment.num_evicted - leaving,
            )
            if part.end - part.start == 1:
                single[0].append(part.start)
                single[1].append(row)
            else:
                longer.append((list(range(segment.start + offset, segment.end + offset)), [row]))
    pieces = [single, *longer] if single[1] else longer
    return [
        Piece(torch.tensor(tokens, device=device), torch.tensor([row.page for row in rows], device=device), rows)
        for tokens, rows in pieces
    ]
