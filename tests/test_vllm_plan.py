"""The plan of a step under vLLM, without vLLM: pieces of any size have their evictions where the schedule has them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_pte import PTEConfig
from peft_pte.cache.schedule import Schedule
from peft_pte.config import CachePolicy
from peft_pte.vllm.plan import Part, num_slots, plan

CPU = torch.device("cpu")


@st.composite
def policies(draw: st.DrawFn) -> CachePolicy:
    prefix = draw(st.one_of(st.just("prompt"), st.integers(0, 5)))
    windows = st.integers(1, 9)
    return PTEConfig(
        window_size=draw(st.one_of(st.just("prompt"), windows) if prefix == "prompt" else windows),
        eviction_ratio=draw(st.sampled_from([0.05, 0.25, 0.34, 0.5, 0.8, 1.0])),
        retained_prefix=prefix,
    ).cache_policy


class Slots:
    """What is stored of a sequence: positions, in the order of its slots."""

    def __init__(self, limit: int):
        self.limit, self.held, self.events = limit, [], []

    def compute(self, row: Any, count: int) -> None:
        """Do what a layer does for a row and so many tokens, and check what it relies on."""
        if row.is_new:
            self.held = []
        if row.leaving:
            gone = self.held[row.prefix : row.prefix + row.leaving]
            assert gone == list(range(row.prefix + row.gone, row.prefix + row.gone + row.leaving))
            del self.held[row.prefix : row.prefix + row.leaving]
            self.events.append((gone[0], self.next_position))
        assert len(self.held) == row.stored
        first = 0 if row.is_new else self.next_position
        self.held += range(first, first + count)
        self.next_position = first + count
        assert len(self.held) <= self.limit


def events_of(policy: CachePolicy, prompt: int, length: int) -> list[tuple[int, int]]:
    """(First position that leaves, the next one.) The definition: n leave before thoughts C, C + n, and so on."""
    schedule = Schedule.create(policy.window(prompt), policy.eviction_ratio)
    prefix, n = policy.prefix(prompt), schedule.num_evicted
    borders = range(prefix + schedule.window, length, n)
    return [(prefix + index * n, border) for index, border in enumerate(borders)]


@settings(max_examples=300)
@given(policies(), st.integers(1, 12), st.integers(0, 2**16))
def test_chunks_of_any_size_are_one_sequence(policy: CachePolicy, prompt: int, seed: int) -> None:
    draw = random.Random(seed)
    length = prompt + draw.randint(0, 40)
    slots, seen = Slots(num_slots(policy, prompt)), 0
    restart = draw.randint(1, length)  # somewhere all begins anew, with the same border
    while seen < length:
        count = min(draw.choice([1, 1, 1, 2, 7, 30]), length - seen)
        for piece in plan([Part(3, 0, count, seen, prompt)], policy, CPU):
            [row] = piece.rows
            assert piece.pages.tolist() == [3]
            slots.compute(row, len(piece.tokens))
        seen += count
        if restart and seen >= restart:
            seen, restart, slots.events = 0, 0, []
    assert slots.events == events_of(policy, prompt, length)


def test_single_tokens_are_one_piece_and_segments_follow() -> None:
    policy = PTEConfig(window_size=4, eviction_ratio=0.5).cache_policy
    # A prompt of 2 and 9 thoughts at once, a token that needs room, one that does not, and a new prompt of one token.
    parts = [Part(5, 0, 11, 0, 2), Part(7, 11, 12, 6, 2), Part(8, 12, 13, 5, 2), Part(9, 13, 14, 0, 1)]
    single, *segments = plan(parts, policy, CPU)
    assert single.tokens.tolist() == [11, 12, 13]
    assert single.pages.tolist() == [7, 8, 9]
    assert [(row.is_new, row.stored, row.leaving, row.gone) for row in single.rows] == [
        (False, 4, 2, 0),
        (False, 5, 0, 0),
        (True, 0, 0, 0),
    ]
    assert [piece.tokens.tolist() for piece in segments] == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9], [10]]
    assert [row.stored for piece in segments for row in piece.rows] == [0, 4, 4, 4]
    assert plan([], policy, CPU) == []


@pytest.mark.parametrize("ratio", [0.1, 0.34, 1.0])
@pytest.mark.parametrize("start", range(0, 40, 3))
def test_segments_may_start_anywhere(start: int, ratio: float) -> None:
    schedule = Schedule.create(7, ratio)
    rest = [segment for segment in schedule.segments(4, 40) if segment.end > start]
    found = list(schedule.segments(4, 40, start=start))
    if rest[0].start < start:  # the eviction before it has happened
        rest[0] = rest[0]._replace(start=start, evict=False)
    assert found == rest
