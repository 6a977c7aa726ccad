"""Replayed decoding steps give what eager ones give, and leave the cache alike.

There is no CUDA graph on the CPU. The step is called directly ("called"), or its operations are recorded and executed
again on the same memory ("recorded"), which is what a graph does: whatever the host decided in the recorded step stays
decided, and a value that is read back to the host is an error. On a machine with a GPU, some tests capture there too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import pickle
import sys
import threading
import types
import warnings
import weakref

import pytest
import torch
from models import FAMILIES, RELATIVES, decode, relative_error, tiny_model, with_adapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from peft_pte import PTECache
from peft_pte.cache import graph, step
from peft_pte.cache.slots import SlotBuffer
from peft_pte.cache.snapshot import Trial, Unsupported, refuse_old_torch
from peft_pte.cache.twin import twin_of
from peft_pte.families import attention_modules
from peft_pte.hooks import decoder as hooks

MODES = ["called", "recorded", *(["captured"] if torch.cuda.is_available() else [])]
GREEDY = dict(do_sample=False, max_new_tokens=24, min_new_tokens=24)


class Recording(TorchDispatchMode):
    """The operations of a block of code, to be executed again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value is read back to the host"
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        results = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        own = [x.untyped_storage().data_ptr() not in given for x in results]  # neither a view nor in place
        self.operations.append((function, args, kwargs or {}, results, own))
        return result

    def replay(self) -> None:
        for function, args, kwargs, results, own in self.operations:
            again = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new, is_own in zip(results, again, own):
                if is_own:
                    old.copy_(new)


class Replaying:
    """Switches replays on, and counts them."""

    def __init__(self, patch: pytest.MonkeyPatch, recorded: bool):
        self.is_on, self.count, self.captures = True, 0, 0
        patch.setattr(graph, "can_replay", lambda device: self.is_on)
        patch.setattr(graph, "EAGER_STEPS", 0)
        patch.setattr(PTECache, "cuda_graph", True)
        replay, capture = graph.DecodeStep.replay, graph.DecodeStep.capture

        def counted_replay(step, cache):
            self.count += 1
            return replay(step, cache)

        def counted_capture(step):
            self.captures += 1
            capture(step)
            if recorded:
                with Recording() as step.graph:
                    step.step()

        patch.setattr(graph.DecodeStep, "replay", counted_replay)
        patch.setattr(graph.DecodeStep, "capture", counted_capture)

    def off(self, function, *args, **kwargs):
        """Call a function eagerly."""
        self.is_on, before = False, self.count
        result = function(*args, **kwargs)
        assert self.count == before
        self.is_on = True
        return result


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    return Replaying(monkeypatch, recorded=True)


@pytest.fixture(scope="module")
def one_model():
    return with_adapter(tiny_model("qwen2"), window_size=8)


@pytest.fixture
def model(one_model):
    return copy.deepcopy(one_model)  # without the steps of other tests


def tokens(length: int = 40, rows: int = 2, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: torch.Tensor, padding: int = 3) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask


def batch() -> dict[str, torch.Tensor]:
    ids = tokens(7)
    mask = left_padded(ids)
    return dict(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)


def assert_alike(a: PTECache, b: PTECache) -> None:
    """Two caches that have seen the same; empty slots may differ."""
    for name in ("lead", "evicted", "stored_length", "columns_left", "limit", "prompt_length", "schedule"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.get_seq_length() == b.get_seq_length()
    assert torch.equal(a.positions.view, b.positions.view)
    empty = (torch.arange(a.stored_length) < torch.tensor(a.lead)[:, None]).to(a.positions.view.device)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.cumulative_length == other.cumulative_length
        assert one.get_mask_sizes(1) == other.get_mask_sizes(1)
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            x, y = (z.masked_fill(empty[:, None, :, None], 0) for z in (x, y))
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
        assert (one.evicted is None) == (other.evicted is None)
        assert one.states.keys() == other.states.keys()
        for name in one.states:
            torch.testing.assert_close(one.states[name], other.states[name], rtol=0, atol=1e-9)


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


class Words(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen += value.flatten().tolist()

    def end(self) -> None:
        self.seen.append(-1)


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


def through_pickle(cache: PTECache) -> PTECache:
    return pickle.loads(pickle.dumps(cache))


def through_file(cache: PTECache) -> PTECache:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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


def test_masked_tokens_are_decoded_eagerly(replaying, model) -> None:
    """A graph knows leading padding only. Steps with any other mask are eager, and replays go on after them."""
    ids = tokens()
    mask = left_padded(ids)
    mask[1, 20] = 0
    expected, eager = replaying.off(decode, model, ids, mask, [7] + [1] * 33)
    actual, cache = decode(model, ids, mask, [7] + [1] * 33)
    # One eager step; then the rows are no longer in lockstep, on storage that is a little larger.
    assert not cache.in_lockstep and (replaying.count, replaying.captures) == (32, 2)
    assert relative_error(actual, expected) < 1e-10
    assert_alike(cache, eager)


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


@pytest.mark.parametrize("kind", ["hidden states", "attentions", "embeddings", "config", "gradients", "autocast"])
def test_special_wishes_are_met_eagerly(replaying, kind: str) -> None:
    model = with_adapter(tiny_model("qwen2", torch.float32, attn_implementation="eager"), window_size=8)
    ids = tokens(10)
    cache = decode(model, ids[:, :9], None, [7, 1, 1])[1]
    eager, count = copy.deepcopy(cache), replaying.count
    assert count == 2

    def step(cache):
        with torch.set_grad_enabled(kind == "gradients"), torch.autocast("cpu", enabled=kind == "autocast"):
            given = dict(input_ids=ids[:, 9:], past_key_values=cache)
            if kind == "embeddings":
                given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids"))
            elif kind in ("hidden states", "attentions"):
                given[f"output_{kind.replace(' ', '_')}"] = True
            return model.get_decoder()(**given)

    model.get_decoder().config.output_hidden_states = kind == "config"
    actual, expected = step(cache), replaying.off(step, eager)
    assert replaying.count == count
    assert (actual.hidden_states is not None) == (kind in ("hidden states", "config"))
    assert (actual.attentions is not None) == (kind == "attentions")
    assert actual.last_hidden_state.requires_grad == (kind == "gradients")
    assert torch.equal(actual.last_hidden_state, expected.last_hidden_state)


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


def warned(replaying, model, ids: torch.Tensor | None = None) -> str:
    """Decode where no graph can be made: the results of eager decoding, and one warning."""
    ids = tokens() if ids is None else ids
    config = model.get_decoder().config
    before = config._attn_implementation
    expected, eager = replaying.off(decode, model, ids, None, [7] + [1] * 33)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, cache = decode(model, ids, None, [7] + [1] * 33)
    messages = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(messages) == 1 and replaying.count == 0
    assert config._attn_implementation == before and step.current_step.get() is None
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert_alike(cache, eager)
    return messages[0]


def steps_of(model: torch.nn.Module) -> graph.Steps:
    return model.get_decoder().pte_attachment.steps


def test_the_next_cache_has_the_graph_at_once(replaying, model, monkeypatch) -> None:
    """A second `generate` of the same shape makes none and waits for none; a prompt may be somewhat shorter."""
    monkeypatch.setattr(graph, "EAGER_STEPS", 8)
    ids = tokens(9)
    counts = []
    for given in (ids, ids + 1, ids[:, 2:]):
        replaying.count = 0
        expected = replaying.off(model.generate, input_ids=given, **GREEDY)
        assert torch.equal(model.generate(input_ids=given, **GREEDY), expected)
        counts.append(replaying.count)
    assert counts == [23 - 8, 23, 23] and replaying.captures == 1
    assert len(steps_of(model).idle) == 1 and not steps_of(model).lent


def counting(monkeypatch, owner: object, name: str) -> list[int]:
    """The calls of a function that is then called as ever."""
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("padded", [False, True])
def test_between_evictions_neither_mask_nor_model_is_looked_at(replaying, model, monkeypatch, padded: bool) -> None:
    """Inside of one `generate` call, whose own loop adds valid columns and nothing else."""
    looks, checks = counting(monkeypatch, graph, "first_slots"), counting(monkeypatch, step.Snapshot, "holds")
    given = batch() if padded else dict(input_ids=tokens(7))
    expected = replaying.off(model.generate, **given, **GREEDY)
    assert torch.equal(model.generate(**given, **GREEDY), expected) and replaying.count == 23
    evictions = 8  # of 2 thoughts from 8 on: before thoughts 8, 10, ..., 22
    assert len(looks) == padded * (1 + evictions) and len(checks) == evictions
    model.generate(**given, **GREEDY)
    assert replaying.captures == 1 and len(checks) == 2 * evictions + 1  # once when the step is borrowed


def test_a_loop_of_its_own_is_looked_at(replaying, model, monkeypatch) -> None:
    """A custom loop may do anything with its mask."""
    looks = counting(monkeypatch, graph, "first_slots")
    ids = tokens(30)

    def loop(*args, **kwargs):
        mask, cache, outputs = kwargs["attention_mask"], kwargs["past_key_values"], []
        for t in range(7, 30):
            columns = slice(0, 7) if t == 7 else slice(t - 1, t)
            if t == 20:
                mask = mask.clone()
                mask[1, 5] = 0
            outputs.append(model(ids[:, columns], attention_mask=mask, past_key_values=cache).logits[:, -1])
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return torch.stack(outputs, dim=1)

    def run() -> torch.Tensor:
        given = dict(input_ids=ids[:, :7], attention_mask=left_padded(ids[:, :7]))
        return model.generate(**given, past_key_values=PTECache(), custom_generate=loop)

    expected = replaying.off(run)
    assert relative_error(run(), expected) < 1e-10
    assert replaying.count == 12 and len(looks) == 22


@pytest.mark.parametrize("kind", ["hook", "mode"])
def test_changes_inside_of_a_generation_are_noticed(replaying, model, kind: str) -> None:
    """By somebody who is called for every token."""
    seen = []

    class Watcher(Words):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.seen) == 17:
                if kind == "hook":
                    model.get_decoder().norm.register_forward_hook(lambda *args: seen.append(args))
                else:
                    model.train()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(input_ids=tokens(7, rows=1), streamer=Watcher(), **GREEDY)
    assert len(seen) == (14 if kind == "hook" else 0)
    assert replaying.captures == (1 if kind == "hook" else 2)


@pytest.mark.parametrize("kind", ["rows", "longer", "much shorter", "inference mode", "adapters"])
def test_other_shapes_have_other_graphs(replaying, model, kind: str) -> None:
    ids = tokens(9)
    mode = contextlib.nullcontext()
    if kind == "much shorter":
        ids = tokens(300)
    decode(model, ids, None, [ids.shape[1] - 2, 1, 1])
    if kind == "rows":
        ids = tokens(9, rows=3)
    elif kind == "longer":
        ids = tokens(12)
    elif kind == "much shorter":
        ids = tokens(9)
    elif kind == "inference mode":
        mode = torch.inference_mode()
    else:
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter("second")
    expected = replaying.off(decode, model, ids, None, [ids.shape[1] - 2, 1, 1])[0]
    with mode:
        actual = decode(model, ids, None, [ids.shape[1] - 2, 1, 1])[0]
    assert replaying.captures == 2 and replaying.count == 4
    assert relative_error(actual, expected) < 1e-10
    assert len(steps_of(model).idle) == graph.MAX_IDLE == 1


CHANGES = {
    "replaced": lambda d: setattr(d.norm, "weight", torch.nn.Parameter(d.norm.weight * 2)),
    "moved": lambda d: setattr(d.norm.weight, "data", d.norm.weight.data * 2),
    "scaling": lambda d: d.layers[0].self_attn.q_proj.pte_scaling.update(default=5.0),
    "attribute": lambda d: setattr(d.layers[0].self_attn, "scaling", 2.0),
    "epsilon": lambda d: setattr(d.norm, "variance_epsilon", 0.5),
    "module": lambda d: setattr(d.layers[0], "mlp", torch.nn.Identity()),
    "mode": lambda d: d.layers[1].train(),
    "decoder's mode": lambda d: d.train(),
    "configuration": lambda d: setattr(d.config, "rms_norm_eps", 0.5),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_between_caches_are_noticed(replaying, model, kind: str) -> None:
    decode(model, tokens(9), None, [7, 1, 1])
    CHANGES[kind](model.get_decoder())
    expected = replaying.off(decode, model, tokens(9), None, [7, 1, 1])[0]
    assert relative_error(decode(model, tokens(9), None, [7, 1, 1])[0], expected) < 1e-10
    assert (replaying.captures, replaying.count) == (2, 4)


@pytest.mark.parametrize("kind", ["view", "layers", "copy"])
def test_what_is_left_of_a_cache_stays_as_it_is(replaying, model, kind: str) -> None:
    """Slots are lent to the next cache only when nobody can see them."""
    cache = decode(model, tokens(9), None, [7, 1, 1])[1]
    kept = {"view": cache.layers[1].keys, "layers": cache.layers, "copy": copy.copy(cache)}[kind]

    def keys() -> torch.Tensor:
        return kept if kind == "view" else (kept if kind == "layers" else kept.layers)[1].keys

    before = keys().clone()
    del cache
    decode(model, tokens(9, seed=4), None, [7, 1, 1])
    assert torch.equal(keys(), before) and replaying.captures == 2


def test_a_deleted_model_goes_at_once(replaying, model) -> None:
    """Steps go with it without a garbage collection, even while caches are alive."""
    caches = [decode(model, tokens(9), None, [7, 1, 1])[1] for _ in range(2)]
    del caches[0]
    steps = steps_of(model)
    (idle,), (lent,) = steps.idle, steps.lent
    assert graph.REPLAYS[caches[0]].step is lent
    assert reachable_modules(lent) - set(model.get_decoder().modules()) == set(lent.decoder.modules())
    assert model.get_decoder() not in reachable_modules(steps)
    references = [weakref.ref(x) for x in (idle, lent, idle.decoder, steps)]
    del steps, idle, lent
    gc.collect()
    gc.disable()
    try:
        model.base_model.unload()
        assert [reference() for reference in references] == [None] * 4
    finally:
        gc.enable()
    assert graph.REPLAYS[caches[0]].step is None


def test_copies_of_a_model_have_no_steps(replaying, model) -> None:
    cache = decode(model, tokens(9), None, [7, 1, 1])[1]
    steps = steps_of(model)
    for twin in (copy.deepcopy(steps), pickle.loads(pickle.dumps(steps)), steps_of(copy.deepcopy(model))):
        assert steps.lent and not twin.lent and not twin.idle
    other = copy.deepcopy(model)  # the cache may go on there
    del model, steps
    eager = copy.deepcopy(cache)
    expected = replaying.off(decode, other, tokens(5, seed=5), None, [1] * 5, eager)[0]
    assert relative_error(decode(other, tokens(5, seed=5), None, [1] * 5, cache)[0], expected) < 1e-10
    assert replaying.captures == 2


def test_failures_are_remembered_for_a_model(replaying, model, monkeypatch) -> None:
    """Nothing is tried a second time, unless for less, or for a model that has changed."""
    tried = []

    def fail(decode_step):
        tried.append(len(decode_step.ids))
        raise RuntimeError("no")

    monkeypatch.setattr(step.DecodeStep, "capture", fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for rows in (2, 2, 3, 1, 1):
            decode(model, tokens(9, rows=rows), None, [7, 1, 1])
        assert tried == [2, 1]
        model.get_decoder().norm.register_forward_pre_hook(lambda *args: None).remove()
        decode(model, tokens(9, rows=1), None, [7, 1, 1])
        assert tried == [2, 1]
        model.get_decoder().norm.variance_epsilon = 0.5
        decode(model, tokens(9, rows=1), None, [7, 1, 1])
        assert tried == [2, 1, 1]


def test_hooks_are_refused(replaying) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    seen = []
    handle = model.get_decoder().layers[1].mlp.register_forward_hook(lambda *args: seen.append(args))
    assert "Qwen2MLP has a forward hook" in warned(replaying, model)
    assert len(seen) == 2 * 34
    handle.remove()
    decode(model, tokens(), None, [7] + [1] * 33)
    assert replaying.count == 33


def test_harmless_hooks(replaying) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    model.enable_input_require_grads()
    with torch.no_grad():
        model(input_ids=tokens(7), output_hidden_states=True)  # transformers puts its hooks in
    decode(model, tokens(), None, [7] + [1] * 33)
    assert replaying.count == 33


def test_a_hook_on_the_way(replaying, model) -> None:
    """A hook that is registered during a generation is called."""
    ids, seen = tokens(), []
    cache = decode(model, ids[:, :20], None, [7] + [1] * 13)[1]
    hook = model.get_decoder().norm.register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match="forward hook"):
        decode(model, ids[:, 20:], None, [1] * 20, cache)
    hook.remove()
    assert len(seen) == 20


@pytest.mark.parametrize("config", [dict(pte_dropout=0.5), dict()])
def test_dropout(replaying, config: dict) -> None:
    """Training mode alone is no reason: rollouts of reinforcement learning are made in it."""
    model = with_adapter(tiny_model("qwen2"), window_size=8, **config).train()
    if not config:
        decode(model, tokens(), None, [7] + [1] * 33)
        assert replaying.count == 33
        model.get_decoder().config.attention_dropout = 0.5
        cache = decode(model.eval(), tokens(8), None, [7, 1])[1]
        assert replaying.count == 34
        model.train()
        with pytest.warns(UserWarning, match="dropout is active"):
            decode(model, tokens(1), None, [1], cache)
    else:
        with pytest.warns(UserWarning, match="dropout is active"):
            decode(model, tokens(8), None, [7, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough, and nothing is tried again
        decode(model, tokens(8), None, [7, 1])


def test_other_attention_is_refused(replaying, monkeypatch) -> None:
    """Softcapping, sinks and the like arrive as arguments that are not known."""
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    capped = functools.partial(step.attend, softcap=30.0)
    monkeypatch.setitem(step.AttentionInterface._global_mapping, step.ATTENTION, capped)
    assert "attention takes `softcap`" in warned(replaying, model)


def test_sliding_window_is_refused(replaying) -> None:
    model = with_adapter(tiny_model("mistral", sliding_window=32768), window_size=8)
    decode(model, tokens(), None, [7] + [1] * 33)
    assert replaying.count == 33
    for layer in model.get_decoder().layers:
        layer.self_attn.config.sliding_window = 10
    with pytest.warns(UserWarning, match="a window of 10 tokens"):
        decode(model, tokens(8), None, [7, 1])


def test_attention_that_goes_its_own_way_is_refused(replaying, monkeypatch) -> None:
    """A family that ignores the configured attention function would attend to slots that are not in use."""
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    sdpa = step.AttentionInterface._global_mapping["sdpa"]
    monkeypatch.setitem(step.AttentionInterface._global_mapping, step.ATTENTION, sdpa)
    assert "do not use the function" in warned(replaying, model)


SYNCHRONISING = {
    "item": lambda x: x * float(x.max()),
    "branch": lambda x: x if bool((x > 0).any()) else -x,
    "nonzero": lambda x: x + x.nonzero().sum() * 0,
    "masked": lambda x: x + x[x > 0].sum() * 0,
    "unique": lambda x: x + x.unique().sum() * 0,
    "equal": lambda x: x if torch.equal(x, x) else -x,
}


@pytest.mark.parametrize("kind", SYNCHRONISING)
def test_steps_that_synchronise_are_found_out_before_a_capture(replaying, kind: str) -> None:
    model = with_adapter(tiny_model("qwen2"), window_size=8)
    mlp = model.get_decoder().layers[1].mlp
    mlp.forward = types.MethodType(lambda mlp, x: SYNCHRONISING[kind](type(mlp).forward(mlp, x)), mlp)
    assert "in the middle of a step" in warned(replaying, model)


def test_moving_data_is_found_out() -> None:
    x = torch.ones(2)
    with Trial():
        x = x + torch.tensor(1.0) * x.to(torch.float64)
    for move in (lambda: x.to("meta"), lambda: torch.empty(2, device="meta").copy_(x)):
        with pytest.raises(Unsupported, match="moves data between devices"), Trial():
            move()


@pytest.mark.parametrize("version, device, refused", [("2.11.0+cu128", "cuda", True), ("2.12.0", "cuda", False)])
def test_old_torch_is_refused(monkeypatch, version: str, device: str, refused: bool) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    refuse_old_torch(torch.device("cpu"))
    with pytest.raises(Unsupported, match="older than 2.12") if refused else contextlib.nullcontext():
        refuse_old_torch(torch.device(device))


def test_a_capture_that_fails(replaying, model, monkeypatch) -> None:
    def fail(step):
        step.forward()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph.DecodeStep, "capture", fail)
    assert "not permitted when stream is capturing" in warned(replaying, model)


def test_workspaces_are_the_graphs_own(model, monkeypatch) -> None:
    """The order of a capture, with a device that does nothing: matrix products find no workspace made before it."""
    events = []

    @contextlib.contextmanager
    def noted(name):
        events.append(name)
        yield
        events.append(f"end of {name}")

    class Nothing:
        def __init__(self, *args, **kwargs):
            pass

        wait_stream = __init__

    decode_step = object.__new__(step.DecodeStep)
    decode_step.ids = torch.empty(1, 1)
    monkeypatch.setattr(step.DecodeStep, "is_on_gpu", True)
    monkeypatch.setattr(step.DecodeStep, "forward", lambda self: events.append("step"))
    decode_step.slot = torch.zeros(1)
    monkeypatch.setattr(step.DecodeStep, "try_out", lambda self: events.append("trial"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: events.append("forget"), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("Stream", "CUDAGraph", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: noted("device"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noted("warm-up"))
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: noted("capture"))
    decode_step.capture()
    warm_up = ["warm-up", "trial", *["step"] * step.WARM_UP_STEPS, "end of warm-up"]
    assert events == ["device", *warm_up, "forget", "capture", "step", "end of capture", "forget", "end of device"]


def test_attention_is_only_for_steps(model) -> None:
    other = copy.deepcopy(model)
    other.get_decoder().config._attn_implementation = step.ATTENTION
    with pytest.raises(RuntimeError, match="do not set it"), torch.no_grad():
        other(input_ids=tokens(7))


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


def test_switches() -> None:
    assert not PTECache().cuda_graph and PTECache(cuda_graph=True).cuda_graph
    cache = PTECache(cuda_graph=True)
    cache.reset()
    assert cache.cuda_graph
    assert not graph.can_replay(torch.device("cpu"))


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


def attributes(model: torch.nn.Module) -> list[dict]:
    """All attributes of all modules, and all settings of their configurations."""
    configs = {id(m.config): vars(m.config) for m in model.modules() if hasattr(m, "config")}
    return [dict(vars(module)) for module in model.modules()] + [dict(config) for config in configs.values()]


def test_the_model_is_left_alone(replaying, model, monkeypatch) -> None:
    """Not even while a step is made does it show on the model, whose hooks and tables are not the twin's."""
    decoder, seen = model.get_decoder(), []
    forward = type(decoder.layers[0].mlp).forward

    def spying_forward(mlp, x):
        if step.current_step.get() is not None:
            seen.append((mlp, attributes(decoder)))
        return forward(mlp, x)

    monkeypatch.setattr(type(decoder.layers[0].mlp), "forward", spying_forward)
    cache = decode(model, tokens(7), None, [7])[1]
    before = attributes(decoder)
    decode(model, tokens(1), None, [1], cache)
    assert replaying.captures == 1 and len(seen) >= 2
    twin = graph.REPLAYS[cache].step.decoder
    assert all(mlp in set(twin.modules()) - set(decoder.modules()) and now == before for mlp, now in seen)
    assert twin.config._attn_implementation == step.ATTENTION != decoder.config._attn_implementation
    assert set(map(id, twin.parameters())) == set(map(id, decoder.parameters()))
    for module in twin.modules():
        module.register_forward_hook(lambda *args: None)
        module.mark = "twin"
    assert attributes(decoder) == before


def test_what_a_twin_refers_to(model) -> None:
    """Nothing in it leads to the original decoder or its modules, which would keep a deleted model alive."""
    decoder = model.get_decoder()
    decoder.layers[0].neighbours = [decoder.layers[1], "text"]
    decoder.layers[0].call_neighbour = decoder.layers[1].mlp.forward
    try:
        twin = twin_of(decoder, step.ATTENTION)
    finally:
        del decoder.layers[0].neighbours, decoder.layers[0].call_neighbour
    assert twin.layers[0].neighbours == [twin.layers[1], "text"]
    assert twin.layers[0].call_neighbour.__self__ is twin.layers[1].mlp
    assert reachable_modules(twin) == set(twin.modules())


def reachable_modules(start: object) -> set[torch.nn.Module]:
    """The modules that an object leads to by strong references, classes and functions left aside."""
    found, waiting = {}, [start]
    while waiting:
        thing = waiting.pop()
        if id(thing) in found or isinstance(thing, (type, types.ModuleType, types.FunctionType, str, int, float)):
            continue
        found[id(thing)] = thing
        waiting += gc.get_referents(thing)
    return {thing for thing in found.values() if isinstance(thing, torch.nn.Module)}


def test_replaced_forwards(replaying) -> None:
    """A method of the module itself moves to its twin; anything else may call the original, and is refused."""

    def doubled(mlp, x):
        return 2 * type(mlp).forward(mlp, x)

    model = with_adapter(tiny_model("qwen2"), window_size=8)
    plain = replaying.off(decode, model, tokens(), None, [7] + [1] * 33)[0]
    mlp = model.get_decoder().layers[1].mlp
    mlp.forward = types.MethodType(doubled, mlp)
    expected = replaying.off(decode, model, tokens(), None, [7] + [1] * 33)[0]
    assert relative_error(decode(model, tokens(), None, [7] + [1] * 33)[0], expected) < 1e-10
    assert replaying.count == 33 and relative_error(plain, expected) > 1e-3
    replaying.count = 0
    mlp.forward = functools.partial(doubled, mlp)
    assert "the forward of a Qwen2MLP was replaced" in warned(replaying, model)


def test_a_wrapper_under_ours_is_refused(replaying) -> None:
    base = tiny_model("qwen2")
    decoder, calls = base.get_decoder(), []

    def counted(decoder, *args, **kwargs):
        calls.append(1)
        return type(decoder).forward(decoder, *args, **kwargs)

    decoder.forward = types.MethodType(counted, decoder)
    assert "was replaced before the adapter" in warned(replaying, with_adapter(base, window_size=8))
    assert len(calls) == 2 * 34


def test_reserve() -> None:
    slots = SlotBuffer()
    slots.append(torch.arange(6.0).view(1, 1, 3, 2), 3)
    data = slots.reserve(3)
    assert data is slots.data and data is slots.reserve(2)
    assert slots.reserve(10).shape == (1, 1, 10, 2) and slots.data is not data
    assert slots.length == 3 and torch.equal(slots.view, torch.arange(6.0).view(1, 1, 3, 2))


def test_live_adapters_are_never_stale(model) -> None:
    """They are kept between calls, by what they depend on."""
    attachment = model.get_decoder().pte_attachment

    def names() -> tuple[str, ...]:
        found = dict.fromkeys(name for encoder in attachment.encoders for name in encoder.live_adapters)
        assert attachment.active()[1] == tuple(found)
        return tuple(found)

    assert names() == ("default",)
    with model.disable_adapter():
        assert names() == ()
    model.add_adapter("second", model.peft_config["default"])
    assert names() == ("default",)
    model.base_model.set_adapter(["second", "default"])
    assert names() == ("second", "default")
    attachment.encoders[0]._active_adapter.reverse()  # in place
    assert names() == ("default", "second")
    model.delete_adapter("second")
    assert names() == tuple(attachment.encoders[0].live_adapters)
    copied = copy.deepcopy(model).get_decoder().pte_attachment
    assert copied.active() == attachment.active()
