"""Replayed decoding steps give what eager ones give, and leave the cache alike."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from models import FAMILIES, RELATIVES, decode, relative_error, through_file, through_pickle, tiny_model, with_adapter
from replays import GREEDY, MODES, Replaying, Words, assert_alike, batch, left_padded, tokens
from transformers import DynamicCache

from peft_pte import PTECache
from peft_pte.cache import graph, step
from peft_pte.cache.slots import SlotBuffer
from peft_pte.families import attention_modules
from peft_pte.hooks import decoder as hooks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES | RELATIVES)
def test_families(monkeypatch, family: str, padded: bool, mode: str) -> None:
    device = "cuda" if mode == "captured" else "cpu"
    model = with_adapter(tiny_model(family), window_size=8).to(device)
    ids = tokens().to(device)
    mask = left_padded(ids) if padded else None
    sizes = [7] + [1] * 33
    monkeypatch.setattr(graph, "can_replay", lambda device: False)
    expected, eager = decode(model, ids, mask, sizes)
    replaying = Replaying(monkeypatch, recorded=mode == "recorded")
    actual, cache = decode(model, ids, mask, sizes)
    assert (replaying.count, replaying.captures) == (33, 1)
    assert relative_error(actual, expected) < 1e-10
    assert_alike(cache, eager)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(monkeypatch, mode: str, dtype: torch.dtype) -> None:
    """Replayed steps are as exact as eager ones: both are compared with the same weights in float64."""
    device = "cuda" if mode == "captured" else "cpu"
    model = with_adapter(tiny_model("qwen3", dtype, head_dim=64), window_size=8).to(device)
    ids = tokens().to(device)
    monkeypatch.setattr(graph, "can_replay", lambda device: False)
    exact, _ = decode(copy.deepcopy(model).double(), ids, left_padded(ids), [7] + [1] * 33)
    eager, _ = decode(model, ids, left_padded(ids), [7] + [1] * 33)
    replaying = Replaying(monkeypatch, recorded=mode == "recorded")
    replayed, _ = decode(model, ids, left_padded(ids), [7] + [1] * 33)
    assert replaying.count == 33
    assert relative_error(replayed, exact) < 1.5 * relative_error(eager, exact)


def test_two_adapters(replaying) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    torch.manual_seed(5)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    expected, eager = replaying.off(decode, model, tokens(), None, [7] + [1] * 33)
    actual, cache = decode(model, tokens(), None, [7] + [1] * 33)
    assert replaying.count == 33 and len(cache.layers[0].states) == 2
    assert relative_error(actual, expected) < 1e-10
    assert_alike(cache, eager)


@pytest.mark.parametrize("in_place", [False, True])
def test_states_may_be_made_at_the_eviction(replaying, model, monkeypatch, in_place: bool) -> None:
    """Whether states are made before the step or in it, and whether in new tensors, makes no difference."""
    expected, eager = replaying.off(decode, model, tokens(), None, [7] + [1] * 33)
    evict = hooks.evict

    def evict_and_encode(cache, *args, **kwargs):
        evict(cache, *args, **kwargs)
        for attention in attention_modules(model.get_decoder()).values():
            layer = cache.layers[attention.layer_idx]
            before = dict(layer.states)
            layer.states_for(attention.thought_encoder, attention, 2)
            if in_place and before:
                layer.states = {name: before[name].copy_(state) for name, state in layer.states.items()}

    monkeypatch.setattr(hooks, "evict", evict_and_encode)
    actual, cache = decode(model, tokens(), None, [7] + [1] * 33)
    assert replaying.count == 33
    assert relative_error(actual, expected) < 1e-10
    assert_alike(cache, eager)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("retained_prefix", ["prompt", 2])
def test_eager_and_replayed_steps_mix(replaying, seed: int, retained_prefix) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=6, retained_prefix=retained_prefix)
    generator = torch.Generator().manual_seed(seed)
    ids = tokens(60, seed=seed)
    mask = left_padded(ids)
    expected, eager = replaying.off(decode, model, ids, mask, [7, 53])
    cache, outputs, start = PTECache(), [], 0
    while start < 60:
        size = 7 if start == 0 else int(torch.randint(1, 5, (1,), generator=generator)) // 4 * 4 or 1
        size = min(size, 60 - start)
        replaying.is_on = bool(torch.rand(1, generator=generator) < 0.7)
        outputs.append(decode(model, ids[:, start : start + size], mask[:, : start + size], [size], cache)[0])
        start += size
    assert replaying.count > 5
    assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-10
    assert_alike(cache, eager)


@pytest.mark.parametrize("options", [GREEDY, dict(do_sample=True, max_new_tokens=24, num_return_sequences=2)], ids=str)
def test_generate(replaying, model, options: dict) -> None:
    torch.manual_seed(0)
    expected = replaying.off(model.generate, **batch(), **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch(), **options), expected)
    assert replaying.count >= 20 and replaying.captures == 1


def test_streaming(replaying, model) -> None:
    ids = batch()["input_ids"][1:]
    expected, actual = Words(), Words()
    replaying.off(model.generate, input_ids=ids, streamer=expected, **GREEDY)
    model.generate(input_ids=ids, streamer=actual, **GREEDY)
    assert replaying.count == 23 and actual.seen == expected.seen


def test_own_cache_and_going_on(replaying, model) -> None:
    """The caller's own cache is adopted with replays on, and goes on in a second call."""
    cache, eager = DynamicCache(), PTECache(cuda_graph=False)
    first = model.generate(**batch(), **GREEDY, past_key_values=cache)
    count = replaying.count
    assert count == 23 and cache.cuda_graph
    assert torch.equal(model.generate(**batch(), **GREEDY, past_key_values=eager), first)
    assert replaying.count == count
    mask = torch.cat([batch()["attention_mask"], torch.ones(2, 24, dtype=torch.long)], dim=1)
    outputs = [
        model.generate(input_ids=first, attention_mask=mask, past_key_values=past, **GREEDY) for past in (cache, eager)
    ]
    assert torch.equal(*outputs)
    assert_alike(cache, eager)


@pytest.mark.parametrize("eager_steps", [0, 8])
@pytest.mark.parametrize("retained_prefix", ["prompt", 2])
def test_beams(replaying, monkeypatch, eager_steps: int, retained_prefix) -> None:
    monkeypatch.setattr(graph, "EAGER_STEPS", eager_steps)
    model = with_adapter(tiny_model("qwen2"), window_size=6, retained_prefix=retained_prefix)
    options = dict(num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=20)
    expected = replaying.off(model.generate, **batch(), **options)
    assert torch.equal(model.generate(**batch(), **options), expected)
    assert bool(replaying.count) == (eager_steps == 0)  # rows are selected after every step, so no graph pays


def test_steps_before_a_graph_is_made(replaying, model, monkeypatch) -> None:
    monkeypatch.setattr(graph, "EAGER_STEPS", 5)
    decode(model, tokens(), None, [7] + [1] * 33)
    assert (replaying.count, replaying.captures) == (28, 1)


def continued(replaying, model, change, seen: int = 20) -> None:
    """Decode, change the cache or the model, go on: replays before and after, the results of eager decoding."""
    ids = tokens(40)
    mask = left_padded(ids)
    caches = []
    logits = []
    for is_on in (False, True):
        replaying.is_on = is_on
        cache = decode(model, ids[:, :seen], mask[:, :seen], [7] + [1] * (seen - 7))[1]
        undo, cache, rows = change(cache)
        before = replaying.count
        more, cache = decode(model, ids[rows, seen:], mask[rows], [1] * (40 - seen), cache)
        undo()
        assert replaying.count - before == is_on * (40 - seen)
        caches.append(cache)
        logits.append(more)
    assert relative_error(logits[1], logits[0]) < 1e-10
    assert_alike(*caches)


def keep() -> None:
    """Nothing to undo."""


@pytest.mark.parametrize("kind", ["reorder", "repeat", "select", "mask"])
def test_rows_are_selected(replaying, model, kind: str) -> None:
    def change(cache):
        if kind == "reorder":
            rows = torch.tensor([1, 0])
            cache.reorder_cache(rows)
        elif kind == "repeat":
            rows = torch.tensor([0, 0, 1, 1])
            cache.batch_repeat_interleave(2)
        elif kind == "select":
            rows = torch.tensor([1])
            cache.batch_select_indices(rows)
        else:
            rows = torch.tensor([1])
            cache.batch_select_indices(torch.tensor([False, True]))
        return keep, cache, rows

    continued(replaying, model, change)
    assert replaying.captures == (1 if kind == "reorder" else 2)  # another number of rows needs another graph


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file])
def test_copies_of_a_cache(replaying, model, duplicate) -> None:
    kept = []

    def change(cache):
        twin = duplicate(cache)
        assert twin not in graph.REPLAYS
        kept.append((cache, copy.deepcopy(cache)))
        return keep, twin, slice(None)

    continued(replaying, model, change)
    for cache, before in kept:  # going on with the copy has left the original alone
        assert_alike(cache, before)


@pytest.mark.parametrize("kind", ["in place", "moved", "replaced", "buffer", "module"])
def test_parameters_change(replaying, kind: str) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    decoder = model.get_decoder()
    projection = decoder.layers[1].self_attn.v_proj
    original = copy.deepcopy(projection)

    def change(cache):
        weight = projection.base_layer.weight
        if kind == "in place":
            with torch.no_grad():
                weight.mul_(0.5)
        elif kind == "moved":
            weight.data = weight.data * 0.5
        elif kind == "replaced":
            projection.base_layer.weight = torch.nn.Parameter(weight.detach() * 0.5)
        elif kind == "buffer":
            decoder.rotary_emb.inv_freq = decoder.rotary_emb.inv_freq * 0.5
        else:
            projection.pte_A["default"] = copy.deepcopy(projection.pte_A["default"])
            projection.pte_A["default"].weight.data *= 0.5

        def undo():
            projection.load_state_dict(original.state_dict())
            if kind == "buffer":
                decoder.rotary_emb.inv_freq = decoder.rotary_emb.inv_freq * 2

        return undo, cache, slice(None)

    continued(replaying, model, change)
    assert replaying.captures == (1 if kind == "in place" else 2)


def test_padding_may_change(replaying, model) -> None:
    """The mask of each call counts, not that of the first."""
    ids = tokens()
    logits = []
    for is_on in (False, True):
        replaying.is_on, cache, outputs = is_on, PTECache(), []
        for start, size in [(0, 7)] + [(t, 1) for t in range(7, 40)]:
            mask = left_padded(ids[:, : start + size], padding=2 if start < 20 else 4)
            outputs.append(decode(model, ids[:, start : start + size], mask, [size], cache)[0])
        logits.append(torch.cat(outputs, dim=1))
    assert replaying.count == 33 and relative_error(logits[1], logits[0]) < 1e-10


def test_inference_mode(replaying, model) -> None:
    """Slots made in inference mode cannot be written to outside: they are copied, and the graph is made again."""
    ids = tokens()
    expected = replaying.off(decode, model, ids, None, [7] + [1] * 33)[0]
    cache, outputs = PTECache(), []
    for start, size in [(0, 7)] + [(t, 1) for t in range(7, 40)]:
        with torch.inference_mode(start < 20 or start >= 30):
            outputs.append(decode(model, ids[:, start : start + size], None, [size], cache)[0])
    assert replaying.count == 33 and replaying.captures == 3
    assert relative_error(torch.cat(outputs, dim=1), expected) < 1e-10


def test_generations_interleaved(replaying, model) -> None:
    ids = torch.stack([tokens(30, seed=seed) for seed in (1, 2)])
    separate = [replaying.off(decode, model, ids[i], None, [5] + [1] * 25)[0] for i in range(2)]
    caches = [PTECache(), PTECache()]
    outputs: list[list[torch.Tensor]] = [[], []]
    for start, size in [(0, 5)] + [(t, 1) for t in range(5, 30)]:
        for i in range(2):
            outputs[i].append(decode(model, ids[i, :, start : start + size], None, [size], caches[i])[0])
    assert replaying.count == 50
    for i in range(2):
        assert relative_error(torch.cat(outputs[i], dim=1), separate[i]) < 1e-10


def test_outputs_are_the_callers(replaying, model) -> None:
    """A later step does not overwrite what an earlier one returned."""
    ids, cache = tokens(12), PTECache()
    decode(model, ids[:, :7], None, [7], cache)
    with torch.no_grad():
        outputs = [model.get_decoder()(ids[:, t : t + 1], past_key_values=cache) for t in range(7, 12)]
    kept = [output.last_hidden_state for output in outputs]
    assert len({x.data_ptr() for x in kept}) == 5 and outputs[0].past_key_values is cache
    assert not torch.equal(kept[0], kept[1])


def test_storage_is_constant(replaying, model) -> None:
    ids, cache, sizes = tokens(60), PTECache(), set()
    decode(model, ids[:, :16], None, [7] + [1] * 9, cache)
    for t in range(16, 60):
        decode(model, ids[:, t : t + 1], None, [1], cache)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1


def test_threads() -> None:
    """The step that is being made belongs to its thread."""
    seen = []
    token = step.current_step.set("ours")
    thread = threading.Thread(target=lambda: seen.append(step.current_step.get()))
    thread.start()
    thread.join()
    step.current_step.reset(token)
    assert seen == [None]


def test_one_thread_captures_and_another_is_eager(replaying, model) -> None:
    """On one model at the same time, each gets what it gets alone."""
    ids = torch.stack([tokens(16, seed=seed) for seed in (1, 2)])
    alone = [replaying.off(decode, model, ids[i], None, [7] + [1] * 9)[0][:, 7:] for i in range(2)]
    interval = sys.getswitchinterval()
    right = [0, 0]

    def go_on(i: int, cache: PTECache, start: threading.Barrier) -> None:
        start.wait()
        logits = decode(model, ids[i, :, 7:], None, [1] * 9, cache)[0]
        right[i] += relative_error(logits, alone[i]) < 1e-10

    sys.setswitchinterval(1e-5)
    try:
        for _ in range(60):
            start = threading.Barrier(2)
            caches = [decode(model, ids[i, :, :7], None, [7], PTECache(cuda_graph=i == 0))[1] for i in range(2)]
            threads = [threading.Thread(target=go_on, args=(i, caches[i], start)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert right == [60, 60] and replaying.count == 9 * 60


def test_reserve() -> None:
    slots = SlotBuffer()
    slots.append(torch.arange(6.0).view(1, 1, 3, 2), 3)
    data = slots.reserve(3)
    assert data is slots.data and data is slots.reserve(2)
    assert slots.reserve(10).shape == (1, 1, 10, 2) and slots.data is not data
    assert slots.length == 3 and torch.equal(slots.view, torch.arange(6.0).view(1, 1, 3, 2))
