"""Tokens are counted, not columns: a row with padding anywhere is the row without it, in decoding and in training."""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, decode, relative_error, through_file, tiny_model, with_adapter
from test_policy import Case, cases, reference_logits
from test_training import assert_same, gradients
from torch.utils._python_dispatch import TorchDispatchMode

from peft_pte import PTECache, sequence_logprobs
from peft_pte.cache import rows
from peft_pte.cache.eviction import evict


def spread(count: int, width: int, generator: torch.Generator) -> list[int]:
    """Columns of `count` tokens out of `width`: the others are padding, in a few runs anywhere."""
    gaps = [0] * (count + 1)
    places = torch.randint(0, count + 1, (3,), generator=generator).tolist()
    for _ in range(width - count):
        gaps[places[int(torch.randint(0, 3, (1,), generator=generator))]] += 1
    columns, column = [], 0
    for gap in gaps[:-1]:
        columns.append(column + gap)
        column += gap + 1
    return columns


class Batch:
    """The rows of a case with padding anywhere; all prompts end before column `border`."""

    def __init__(self, case: Case, spare: int):
        generator = torch.Generator().manual_seed(case.seed + 1)
        self.border = max(case.prompts) + spare
        self.ids = torch.zeros(len(case.rows), self.border + max(case.completions) + spare, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for row, (tokens, prompt) in enumerate(zip(case.rows, case.prompts)):
            tail = self.ids.shape[1] - self.border
            columns = spread(prompt, self.border, generator)
            columns += [self.border + c for c in spread(len(tokens) - prompt, tail, generator)]
            self.ids[row, columns] = torch.tensor(tokens)
            self.mask[row, columns] = 1

    def row(self, tensor: torch.Tensor, row: int) -> torch.Tensor:
        """What a row's tokens got."""
        return tensor[row, self.mask[row].bool()]


def sizes_of(data: st.DataObject, total: int, first: int = 0) -> list[int]:
    """Sizes of calls: `first` columns, then any numbers."""
    sizes = [first] if first else []
    while sum(sizes) < total:
        sizes.append(min(data.draw(st.sampled_from([1, 1, 2, 3, 5, 17])), total - sum(sizes)))
    return sizes


def models_of(case: Case, **config: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """For the batch, and for its rows alone: a window of the prompt's length is that of the longest in the batch."""
    window = case.config["window_size"]
    for_rows = case.config | {"window_size": max(case.prompts) if window == "prompt" else window}
    first, second = (
        with_adapter(tiny_model(case.family, seed=case.seed), **c, **config) for c in (case.config, for_rows)
    )
    return first, second


def stored_keys(cache: PTECache, mask: torch.Tensor | None, row: int, layer: int) -> torch.Tensor:
    keys = cache.layers[layer].keys[row]
    return keys if mask is None else keys[:, cache.compact_mask(mask, 0)[row].bool()]


@settings(max_examples=50)
@given(case=cases(), spare=st.integers(0, 9), data=st.data())
def test_decoding(case: Case, spare: int, data: st.DataObject) -> None:
    """Logits, stored keys, states and the number of evicted tokens of a row in a batch are those of the row alone."""
    model, alone_model = models_of(case)
    batch = Batch(case, spare)
    keeps_prompt = case.config["retained_prefix"] == "prompt"
    sizes = sizes_of(data, batch.ids.shape[1], batch.border if keeps_prompt else 0)
    logits, cache = decode(model, batch.ids, batch.mask, sizes)
    for row, tokens in enumerate(case.rows):
        steps = [case.prompts[row]] + [1] * case.completions[row]
        expected, alone = decode(alone_model, torch.tensor([tokens]), None, steps)
        assert relative_error(batch.row(logits, row), expected[0]) <= 1e-10
        assert cache.num_evicted[row] == alone.num_evicted[0]
        for index, (ours, own) in enumerate(zip(cache.layers, alone.layers)):
            keys = stored_keys(cache, batch.mask, row, index), stored_keys(alone, None, 0, index)
            torch.testing.assert_close(*keys, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.cores["default"][row], own.cores["default"][0], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(ours.states["default"][row], own.states["default"][0], rtol=1e-9, atol=1e-9)


@settings(max_examples=50)
@given(case=cases(), spare=st.integers(0, 9), data=st.data())
def test_replay(case: Case, spare: int, data: st.DataObject) -> None:
    """The teacher-forced forward gives what decoding gives, also for borders of different columns."""
    model, alone_model = models_of(case)
    batch = Batch(case, spare)
    # The border may be any column between the last token of the prompt and the first thought.
    where = [batch.mask[row].nonzero()[:, 0].tolist() for row in range(len(case.rows))]
    borders = [data.draw(st.integers(c[prompt - 1] + 1, c[prompt])) for c, prompt in zip(where, case.prompts)]
    with torch.no_grad():
        replayed = model(input_ids=batch.ids, attention_mask=batch.mask, prompt_lengths=borders).logits
    for row, tokens in enumerate(case.rows):
        steps = [case.prompts[row]] + [1] * case.completions[row]
        expected, _ = decode(alone_model, torch.tensor([tokens]), None, steps)
        assert relative_error(batch.row(replayed, row), expected[0]) <= 1e-10


@settings(max_examples=25)
@given(case=cases(), spare=st.integers(1, 9))
def test_reference(case: Case, spare: int) -> None:
    """Both ways are those of the plain implementation, which knows no padding."""
    model, _ = models_of(case)
    batch = Batch(case, spare)
    with torch.no_grad():
        replayed = model(input_ids=batch.ids, attention_mask=batch.mask, prompt_lengths=batch.border).logits
    decoded, _ = decode(model, batch.ids, batch.mask, [batch.border] + [1] * (batch.ids.shape[1] - batch.border))
    for row, expected in enumerate(reference_logits(case, model)):
        assert relative_error(batch.row(replayed, row), expected) <= 1e-10
        assert relative_error(batch.row(decoded, row), expected) <= 1e-10


@settings(max_examples=25)
@given(case=cases(), spare=st.integers(0, 9), truncated=st.booleans(), checkpointed=st.booleans())
def test_gradients(case: Case, spare: int, truncated: bool, checkpointed: bool) -> None:
    """Gradients of a batch are finite, and the sum of those of its rows alone."""
    gradient = "truncated" if truncated else "full"
    model, alone_model = (model.train() for model in models_of(case, gradient=gradient))
    batch = Batch(case, spare)
    if checkpointed:
        model.gradient_checkpointing_enable()
    weights = torch.linspace(0.5, 1.5, 61, dtype=torch.float64)
    logits = model(input_ids=batch.ids, attention_mask=batch.mask, prompt_lengths=batch.border).logits
    assert logits.isfinite().all()
    actual = gradients(model, (logits.log_softmax(-1)[batch.mask.bool()] * weights).sum())
    total: dict[str, torch.Tensor] = {}
    for tokens, prompt in zip(case.rows, case.prompts):
        logits = alone_model(input_ids=torch.tensor([tokens]), prompt_lengths=prompt).logits
        for name, value in gradients(alone_model, (logits.log_softmax(-1) * weights).sum()).items():
            total[name] = total.get(name, 0) + value
    assert all(value.isfinite().all() for value in actual.values())
    assert_same(actual, total)


@settings(max_examples=40)
@given(case=cases(), spare=st.integers(0, 9))
def test_logprobs(case: Case, spare: int) -> None:
    """Log-probabilities and entropies stand at their tokens, whatever is between a token and the one before it."""
    model, alone_model = models_of(case)
    batch = Batch(case, spare)
    with torch.no_grad():
        results = sequence_logprobs(model, batch.ids, batch.mask, batch.border)
        with model.disable_adapter():
            of_base, _ = sequence_logprobs(model, batch.ids, batch.mask, batch.border)
            base_logits = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        for row, (tokens, prompt) in enumerate(zip(case.rows, case.prompts)):
            expected = sequence_logprobs(alone_model, torch.tensor([tokens]), None, prompt)
            for ours, own in zip(results, expected):
                torch.testing.assert_close(batch.row(ours, row), own[0], rtol=1e-9, atol=1e-9)
                assert (ours[row, batch.mask[row] == 0] == 0).all()
            assert (expected[0][0, prompt:] < 0).all()
            # The base model counts positions in its own way, over padding between tokens too.
            logprobs = batch.row(base_logits, row).log_softmax(-1)[prompt - 1 : -1]
            logprobs = logprobs.gather(-1, torch.tensor(tokens[prompt:])[:, None])[:, 0]
            torch.testing.assert_close(batch.row(of_base, row)[prompt:], logprobs, rtol=1e-9, atol=1e-9)


@settings(max_examples=15)
@given(case=cases(), spare=st.integers(0, 9))
def test_gradients_through_a_cache(case: Case, spare: int) -> None:
    """A cache that is fed under autograd moves rows apart without losing a gradient."""
    model, _ = models_of(case)
    batch = Batch(case, spare)
    call = dict(input_ids=batch.ids, attention_mask=batch.mask, prompt_lengths=batch.border)
    found = []
    for use_cache in (False, True):
        logits = model(**call, use_cache=use_cache).logits[batch.mask.bool()]
        found.append(gradients(model, logits.log_softmax(-1).square().sum()))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("retained_prefix", ["prompt", 2])
def test_second_turn_after_answers_of_different_lengths(retained_prefix) -> None:
    """`generate` feeds padding to rows that have stopped; a second turn masks it, and it is no thought any more."""
    model = with_adapter(tiny_model("qwen2"), window_size=12, retained_prefix=retained_prefix)
    ids = torch.randint(3, 61, (2, 50), generator=torch.Generator().manual_seed(0))
    answers = 4, 9  # of the first turn, after prompts of 5 tokens
    width = 5 + max(answers)
    first = torch.ones(2, width, dtype=torch.long)  # as `generate` counts
    logits, cache = decode(model, ids[:, :width], first, [5] + [1] * (width - 5))
    mask = torch.ones_like(ids)
    mask[0, 5 + answers[0] : width] = 0
    more, cache = decode(model, ids[:, width:], mask, [10] + [1] * (40 - width), cache)
    logits = torch.cat([logits, more], dim=1)
    for row in range(2):
        tokens = ids[row, mask[row].bool()]
        expected, alone = decode(model, tokens[None], None, [5] + [1] * (len(tokens) - 5))
        assert relative_error(logits[row, mask[row].bool()], expected[0]) <= 1e-10
        assert cache.num_evicted[row] == alone.num_evicted[0] > 20


def staggered(
    batch_size: int = 3, steps: int = 30, **config: Any
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """Rows that are never full at the same time."""
    model = with_adapter(tiny_model("llama"), **(dict(window_size=6, retained_prefix=2, eviction_ratio=0.5) | config))
    ids = torch.randint(3, 61, (batch_size, 8 + steps), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        mask[row, :row] = 0
    return model, ids, mask


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), through_file],
    ids=["copy", "pickle", "file"],
)
def test_copies_of_a_cache(duplicate, inference: bool) -> None:
    """Copies go on as the original would, which is left alone; also of what was made in inference mode."""
    model, ids, mask = staggered()
    expected, whole = decode(model, ids, mask, [8] + [1] * 30)
    with torch.inference_mode(inference):
        _, cache = decode(model, ids[:, :20], mask, [8] + [1] * 12)
    assert not cache.in_lockstep
    for _ in range(2):
        rest, twin = decode(model, ids[:, 20:], mask, [1] * 18, duplicate(cache))
        assert relative_error(rest, expected[:, 20:]) <= 1e-10
        assert twin.num_evicted == whole.num_evicted


@pytest.mark.parametrize("kind", ["reorder", "repeat", "select", "mask"])
def test_rows_are_selected(kind: str) -> None:
    model, ids, mask = staggered()
    expected, whole = decode(model, ids, mask, [8] + [1] * 30)
    _, cache = decode(model, ids[:, :20], mask, [8] + [1] * 12)
    if kind == "reorder":
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
    elif kind == "repeat":
        order = torch.tensor([0, 0, 1, 1, 2, 2])
        cache.batch_repeat_interleave(2)
    elif kind == "select":
        order = torch.tensor([2, 1])
        cache.batch_select_indices(order)
    else:
        order = torch.tensor([1])
        cache.batch_select_indices(torch.tensor([False, True, False]))
    rest, cache = decode(model, ids[order, 20:], mask[order], [1] * 18, cache)
    assert relative_error(rest, expected[order, 20:]) <= 1e-10
    assert cache.num_evicted == [whole.num_evicted[row] for row in order.tolist()]


def test_a_mask_is_needed_out_of_lockstep() -> None:
    model, ids, mask = staggered()
    _, cache = decode(model, ids[:, :20], mask, [20])
    with pytest.raises(ValueError, match="`attention_mask` is missing, but the cache has seen 20 columns with padding"):
        decode(model, ids[:, 20:21], None, [1], cache)


def test_bytes_are_constant() -> None:
    """From the first eviction on, also where rows are full at different times."""
    model, ids, mask = staggered(steps=200, window_size=20)
    _, cache = decode(model, ids[:, :31], mask, [31])
    assert not cache.in_lockstep and any(cache.num_evicted)
    sizes = set()
    for column in range(31, ids.shape[1]):
        decode(model, ids[:, column : column + 1], mask[:, : column + 1], [1], cache)
        sizes.add(cache.nbytes)
        assert cache.stored_length <= 2 + 20 + rows.slack(20)
    assert len(sizes) == 1


class Operations(TorchDispatchMode):
    """Counts the operations of a block of code, and those that make the host and the device wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        self.waits += function in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.lift_fresh.default,  # torch.tensor(numbers)
        )
        return function(*args, **(kwargs or {}))


def operations_of(batch_size: int, evicts: bool) -> Operations:
    """Of what the cache does in one step of rows that are never full at the same time."""
    model, ids, mask = staggered(batch_size, steps=80, window_size=40)
    columns = 42 + 20 + (0 if evicts else -2)  # the first row is full again there
    _, cache = decode(model, ids[:, :columns], mask[:, :columns], [20] + [1] * (columns - 20))
    assert not cache.in_lockstep
    before, mask, positions = cache.num_evicted, mask[:, : columns + 1], torch.full((batch_size, 1), columns)
    operations, tolist = Operations(), torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> list:
        operations.waits += 1
        return tolist(tensor)

    with torch.no_grad(), operations, patch.object(torch.Tensor, "tolist", counted):
        evict(cache, mask, model.get_decoder())
        cache.compact_mask(mask, 1)
        cache.begin_step(positions)
    assert sum(cache.num_evicted) - sum(before) == evicts * 20
    return operations


def test_steps_out_of_lockstep_are_cheap() -> None:
    """The host neither makes tables nor waits until thoughts leave; what it launches is the same for any batch."""
    few, many = (operations_of(batch_size, evicts=False) for batch_size in (2, 16))
    assert few.waits == many.waits == 0
    assert few.count == many.count <= 25
    few, many = (operations_of(batch_size, evicts=True) for batch_size in (2, 16))
    assert few.waits == many.waits == 2  # what leaves is read, and the rows in which it does are written
    assert few.count == many.count


@pytest.mark.parametrize("retained_prefix", ["prompt", 4])
def test_lockstep_is_kept_without_padding_among_thoughts(retained_prefix) -> None:
    """Left-padded prompts that are kept, and rows without padding, are evicted together."""
    model, ids, mask = staggered(retained_prefix=retained_prefix)
    mask = mask if retained_prefix == "prompt" else torch.ones_like(mask)
    _, cache = decode(model, ids, mask, [8] + [1] * 30)
    assert cache.in_lockstep and min(cache.num_evicted) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_waiting_rows(family: str) -> None:
    """A row may wait for many steps, and another begin late: masked steps of one token change nothing in a row."""
    model = with_adapter(tiny_model(family), window_size=5, retained_prefix=1)
    ids = torch.randint(3, 61, (3, 60), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 12:45], mask[1, :30], mask[2, 20:] = 0, 0, 0
    mask[0, 50] = 0
    logits, cache = decode(model, ids, mask, [1] * 60)
    for row in range(3):
        tokens = ids[row, mask[row].bool()]
        expected, alone = decode(model, tokens[None], None, [1] * len(tokens))
        assert relative_error(logits[row, mask[row].bool()], expected[0]) <= 1e-10
        assert cache.num_evicted[row] == alone.num_evicted[0]
