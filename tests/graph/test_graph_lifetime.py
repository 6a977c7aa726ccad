"""To which model and cache a graph belongs, how long, and what of them it may look at or change."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import types
import warnings
import weakref

import pytest
import torch
from models import decode, relative_error
from replays import GREEDY, Words, batch, counting, left_padded, steps_of, tokens

from peft_pte import PTECache
from peft_pte.cache import graph, step
from peft_pte.cache.twin import twin_of


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


def test_switches() -> None:
    assert not PTECache().cuda_graph and PTECache(cuda_graph=True).cuda_graph
    cache = PTECache(cuda_graph=True)
    cache.reset()
    assert cache.cuda_graph
    assert not graph.can_replay(torch.device("cpu"))


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
