"""`peft_pte.window`: any call under another window is that of a model which is configured so."""

from __future__ import annotations

import copy
import threading
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import decode, tiny_model, with_adapter
from test_policy import Case, cases, right_padded
from test_threads import both
from test_training import assert_same, gradients
from torch import nn

from peft_pte import PTECache, sequence_logprobs, sequence_loss, window
from peft_pte.families import find_decoder
from peft_pte.hooks.window import current_overrides

IDS = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(30) < 5, -100)
GREEDY = dict(max_new_tokens=24, min_new_tokens=24, do_sample=False)


@st.composite
def windows(draw: st.DrawFn, prefix: Any) -> dict[str, Any]:
    """What may be changed of a configuration with this `retained_prefix`."""
    changes = dict(
        window_size=draw(st.integers(1, 9)),
        eviction_ratio=draw(st.sampled_from([0.1, 0.3, 0.5, 1.0])),
        retained_prefix=draw(st.one_of(st.just("prompt"), st.integers(0, 4))),
    )
    return {name: changes[name] for name in draw(st.sets(st.sampled_from(sorted(changes)), min_size=1))}


def change(base: dict[str, Any], changes: dict[str, Any]) -> bool:
    """Whether the configuration is one."""
    changed = base | changes
    return not (changed["window_size"] == "prompt" and changed["retained_prefix"] != "prompt")


@settings(max_examples=8)
@given(
    case=cases(),
    data=st.data(),
    gradient=st.sampled_from(["full", "truncated"]),
    checkpointing=st.booleans(),
)
def test_a_training_step_is_that_of_the_configuration(
    case: Case, data: st.DataObject, gradient: str, checkpointing: bool
) -> None:
    """Loss and gradients, where the backward pass comes after the context, and inside of another one."""
    changes = data.draw(windows(case.config["retained_prefix"]))
    if not change(case.config, changes):
        return
    ids, mask = right_padded(case)
    found = []
    for own, context in ((case.config | changes, {}), (case.config, changes)):
        model = with_adapter(tiny_model(case.family, seed=case.seed), **own, gradient=gradient).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        if context:
            with window(model, **context):
                value = sequence_logprobs(model, ids, mask, case.prompts)[0].sum()
            with window(model, 1000, retained_prefix="prompt"):
                found.append(gradients(model, value) | {"loss": value.detach()})
        else:
            value = sequence_logprobs(model, ids, mask, case.prompts)[0].sum()
            found.append(gradients(model, value) | {"loss": value.detach()})
    assert torch.equal(found[1].pop("loss"), found[0].pop("loss"))
    assert_same(found[1], found[0])


def configured(**config: Any) -> nn.Module:
    return with_adapter(tiny_model("llama"), **config)


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (dict(window_size=20), dict(window_size=6)),
    (dict(window_size=6), dict(retained_prefix=2)),
    (dict(window_size=20), dict(window_size=6, eviction_ratio=0.6, retained_prefix=3)),
    (dict(window_size=6), dict(window_size="prompt")),
]


@pytest.mark.parametrize("config, changes", CHANGES)
def test_every_kind_of_call(config: dict[str, Any], changes: dict[str, Any]) -> None:
    """A forward, a loss, decoding by hand, `generate` with and without a cache, bit for bit; before and after, the
    configuration's own."""
    model, expected = configured(**config), configured(**(config | changes))

    def results(model: nn.Module) -> list[torch.Tensor]:
        with torch.no_grad():
            found = [
                model(input_ids=IDS, prompt_lengths=5).logits,
                sequence_loss(model, IDS, LABELS),
                model.generate(input_ids=IDS[:, :7], **GREEDY),
                model.generate(input_ids=IDS[:, :7], use_cache=False, max_new_tokens=8, do_sample=False),
            ]
        logits, cache = decode(model, IDS, None, [5, 7, 1, 1, 16])
        return [*found, logits, torch.tensor(cache.num_evicted)]

    before = results(model)
    with window(model, **changes):
        inside = results(model)
    after = results(model)
    wanted = results(expected)
    assert all(map(torch.equal, inside, wanted)) and all(map(torch.equal, before, after))
    assert not torch.equal(before[0], wanted[0])  # it does matter


def test_nested_and_of_one_model_only() -> None:
    model, other = configured(window_size=20), configured(window_size=20)
    with torch.no_grad():

        def logits(model: nn.Module) -> torch.Tensor:
            return model(input_ids=IDS, prompt_lengths=5).logits

        own = logits(model)
        both_changed = logits(configured(window_size=4, eviction_ratio=0.5))
        with window(model, 6, eviction_ratio=0.5):
            with window(model.get_base_model(), 4):  # the inner one says what it names, of any wrapper of the model
                assert torch.equal(logits(model), both_changed)
                assert torch.equal(logits(other), own)
            with pytest.raises(KeyError), window(model, 3):
                raise KeyError
            assert torch.equal(logits(model), logits(configured(window_size=6, eviction_ratio=0.5)))
            assert torch.equal(logits(copy.deepcopy(model)), own)  # another model
        assert torch.equal(logits(model), own)
    assert current_overrides.get() == ()


def test_a_cache_keeps_its_window() -> None:
    """Going on under another window is refused in both directions, also by `generate`; the cache stays usable."""
    model = configured(window_size=6)
    _, cache = decode(model, IDS[:, :20], None, [5, 15])
    with window(model, 7), pytest.raises(ValueError, match="keeps its window: start a new one"):
        model(input_ids=IDS[:, 20:21], past_key_values=cache)
    with window(model, 7):
        inner = PTECache()
        model.generate(input_ids=IDS[:, :5], past_key_values=inner, **GREEDY)
    with pytest.raises(ValueError, match="keeps its window"), pytest.warns(UserWarning, match="holds thoughts already"):
        model.generate(input_ids=IDS, past_key_values=inner, **GREEDY)
    logits, _ = decode(model, IDS[:, 20:], None, [10], cache)
    assert torch.equal(logits, decode(model, IDS, None, [5, 15, 10])[0][:, 20:])
    with window(model, 6):  # the same policy by another name
        decode(model, IDS[:, :1], None, [1], cache)


def test_generate_keeps_its_window_when_a_processor_looks_elsewhere() -> None:
    """Inside of `generate`, another text is read under another window, with a cache of its own."""
    model = configured(window_size=6)

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with window(model, 3), torch.no_grad():
            model(input_ids=IDS[:1], prompt_lengths=5)
        return scores

    greedy = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False)
    expected = model.generate(input_ids=IDS[:, :7], **greedy)
    assert torch.equal(model.generate(input_ids=IDS[:, :7], logits_processor=[look], **greedy), expected)


def test_threads() -> None:
    """Each thread has the window it has entered; one that enters none has the configuration's."""
    model = with_adapter(tiny_model("llama", torch.float32), window_size=8).train()

    def training(size: int | None) -> torch.Tensor:
        parameters = [p for p in model.parameters() if p.requires_grad]
        if size is None:
            loss = model(input_ids=IDS, labels=LABELS).loss
        else:
            with window(model, size):
                loss = model(input_ids=IDS, labels=LABELS).loss
        return torch.cat([loss.detach()[None], *(g.flatten() for g in torch.autograd.grad(loss, parameters))])

    def generation() -> torch.Tensor:
        with window(model, 4):
            return model.generate(input_ids=IDS[:1, :7], **GREEDY)

    assert not torch.equal(training(None), training(5))
    assert both(lambda: training(None), lambda: training(5), rounds=2) == 4
    assert both(lambda: training(None), generation, rounds=2) == 4
    with window(model, 5):
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(training(None)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], training(None))


def test_bad_input() -> None:
    model, streaming = configured(window_size=6), configured(window_size=6, retained_prefix=2)
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (tiny_model("llama"), dict(window_size=6), r"`model` \(LlamaForCausalLM\) has no PTE adapter"),
        (model, {}, "`window` was given nothing to change"),
        (model, dict(window_size=0), "PTEConfig: `window_size` is 0, but must be a positive integer or 'prompt'"),
        (model, dict(window_size=2.5), "PTEConfig: `window_size` is 2.5, but"),
        (model, dict(eviction_ratio=1.5), r"PTEConfig: `eviction_ratio` is 1.5, but must be in \(0, 1\]"),
        (model, dict(retained_prefix=-1), "PTEConfig: `retained_prefix` is -1, but"),
        (streaming, dict(window_size="prompt"), "that needs retained_prefix='prompt'"),
    ]
    for of, changes, message in cases:
        with pytest.raises(ValueError, match=message), window(of, **changes):
            pass
    with window(model, "prompt"), pytest.raises(ValueError, match="that needs"), window(model, retained_prefix=2):
        pass
    assert current_overrides.get() == ()


def test_compiled() -> None:
    """What was compiled under one window computes another one, too."""
    ids, one_layer = IDS[:, :18], dict(num_hidden_layers=1)
    model = with_adapter(tiny_model("llama", **one_layer), window_size=20)
    expected = with_adapter(tiny_model("llama", **one_layer), window_size=6, eviction_ratio=1.0)
    torch._dynamo.reset()
    for layer in find_decoder(model).layers:
        layer.compile(backend="eager")
    with torch.no_grad():
        wanted = expected(input_ids=ids, prompt_lengths=5).logits
        before = model(input_ids=ids, prompt_lengths=5).logits
        with window(model, 6, eviction_ratio=1.0):
            found = model(input_ids=ids, prompt_lengths=5).logits
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, wanted)
    torch._dynamo.reset()


def test_captured_steps() -> None:
    """Steps that were made for one window do not serve another; both are captured."""
    model = with_adapter(tiny_model("llama"), window_size=20)
    options = dict(max_new_tokens=40, min_new_tokens=40, do_sample=False)
    with (
        patch("peft_pte.cache.graph.can_replay", lambda device: True),
        patch("peft_pte.cache.step.DecodeStep.replay", autospec=True, side_effect=replay_of()) as replayed,
    ):
        for size in (20, 6, 20):
            expected = configured(window_size=size).generate(input_ids=IDS[:1, :7], **options)
            before, cache = replayed.call_count, PTECache(cuda_graph=True)
            with window(model, size):
                assert torch.equal(model.generate(input_ids=IDS[:1, :7], past_key_values=cache, **options), expected)
            assert replayed.call_count > before + 20


def replay_of() -> Any:
    from peft_pte.cache.step import DecodeStep

    return DecodeStep.replay
