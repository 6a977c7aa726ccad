"""A prompt may come in several calls, as long as no thought is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import decode, relative_error, tiny_model, with_adapter
from test_padding import Batch
from test_policy import Case, cases

from peft_pte import PTECache
from peft_pte.config import CachePolicy


@settings(max_examples=40)
@given(case=cases(), spare=st.integers(0, 5), data=st.data())
def test_prompts_in_several_calls(case: Case, spare: int, data: st.DataObject) -> None:
    """Whatever was said of its length on the way, if it was not too much: the result is that of the prompt at once."""
    model = with_adapter(tiny_model(case.family, seed=case.seed), **case.config)
    batch = Batch(case, spare)
    rest = [1] * (batch.ids.shape[1] - batch.border)
    expected, whole = decode(model, batch.ids, batch.mask, [batch.border, *rest])
    cache, outputs, start, told = PTECache(), [], 0, 0
    while start < batch.border:
        end = data.draw(st.integers(start + 1, batch.border))
        told = max(told, data.draw(st.integers(end, batch.border)))
        call = batch.ids[:, start:end], batch.mask[:, :end], [end - start]
        outputs.append(decode(model, *call, cache, prompt_lengths=told)[0])
        start = end
    outputs.append(decode(model, batch.ids[:, start:], batch.mask, rest, cache, prompt_lengths=batch.border)[0])
    valid = batch.mask.bool()
    assert relative_error(torch.cat(outputs, dim=1)[valid], expected[valid]) <= 1e-10
    assert cache.num_evicted == whole.num_evicted and cache.schedule == whole.schedule
    for ours, other in zip(cache.layers, whole.layers):
        torch.testing.assert_close(ours.cores["default"], other.cores["default"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window_size", [6, "prompt"])
def test_a_shared_prompt_is_read_once(window_size) -> None:
    """Copies of a cache that holds the first part of a prompt go on with different second parts."""
    model = with_adapter(tiny_model("llama"), window_size=window_size)
    ids = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[1, :5] = ids[0, :5]
    _, shared = decode(model, ids[:1, :5], None, [5])
    for row, prompt in enumerate((9, 12)):
        expected, whole = decode(model, ids[row : row + 1], None, [prompt] + [1] * (40 - prompt))
        cache = copy.deepcopy(shared)
        sizes = [prompt - 5] + [1] * (40 - prompt)
        logits, _ = decode(model, ids[row : row + 1, 5:], None, sizes, cache, prompt_lengths=prompt)
        assert relative_error(logits, expected[:, 5:]) <= 1e-10
        assert cache.num_evicted == whole.num_evicted and cache.num_evicted[0] > 10
    assert shared.get_seq_length() == shared.prompt_length == 5


def told(window_size: Any = 4, retained_prefix: Any = "prompt", seen: int = 6, prompt_length: int = 6) -> PTECache:
    """A cache without a model that has seen some columns."""
    cache = PTECache()
    cache.bind(CachePolicy(window_size, 0.5, "sliding_window", retained_prefix, "full", False), ("default",), 1, 1)
    cache.begin_prompt(None, seen, prompt_length)
    cache.begin_step(torch.arange(seen)[None])
    cache.layers[0].update(torch.zeros(1, 1, seen, 2), torch.zeros(1, 1, seen, 2))
    return cache


def test_the_kept_prefix_grows() -> None:
    cache = told("prompt")
    assert (cache.prefix, cache.schedule.window) == (6, 6)
    cache.begin_prompt(None, 2, 10)
    assert (cache.prefix, cache.schedule) == (10, None)  # made when the whole prompt is there
    assert cache.room() == 4
    cache.begin_prompt(None, 4, None)
    assert (cache.prefix, cache.schedule.window) == (10, 10)
    cache.begin_prompt(None, 4, 10)
    assert cache.schedule.window == 10


@pytest.mark.parametrize(
    "seen, noted, new",
    [(8, 6, 10), (8, 6, 8), (6, 6, 5), (4, 6, 5)],
    ids=["thoughts", "thoughts as prompt", "shorter than seen", "shorter than told"],
)
def test_prompts_that_cannot_go_on(seen: int, noted: int, new: int) -> None:
    cache = told(seen=seen, prompt_length=noted)
    with pytest.raises(ValueError, match=f"is to have {new} columns, but this cache was told {noted} and has seen"):
        cache.begin_prompt(None, 1, new)
    assert cache.prompt_length == noted and cache.schedule.window == 4
    cache.begin_prompt(None, 1, noted)
    cache.begin_prompt(None, 1, None)


def test_the_length_of_a_prompt_that_streams_says_nothing() -> None:
    cache = told(retained_prefix=2, seen=8)
    for length in (3, 8, 20):
        cache.begin_prompt(None, 1, length)
    assert cache.prefix == 2
