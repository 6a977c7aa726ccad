"""What no graph can be made of is decoded eagerly, with the same results, and said once."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import warnings

import pytest
import torch
from models import decode, relative_error, tiny_model, with_adapter
from replays import assert_alike, left_padded, tokens, warned

from peft_pte.cache import graph, step
from peft_pte.cache.snapshot import Trial, Unsupported, refuse_old_torch


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


def test_attention_is_only_for_steps(model) -> None:
    other = copy.deepcopy(model)
    other.get_decoder().config._attn_implementation = step.ATTENTION
    with pytest.raises(RuntimeError, match="do not set it"), torch.no_grad():
        other(input_ids=tokens(7))


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
