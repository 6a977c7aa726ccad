"""A model with an adapter is an ordinary model: pickled, copied, wrapped by others, attached twice, deleted."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import relative_error, tiny_model, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.integrations.neftune import neftune_post_forward_hook

from peft_pte import PTECache, PTEConfig, sequence_logprobs
from peft_pte.encoder import ThoughtEncoder
from peft_pte.layer import Linear

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
LABELS = IDS.where(torch.arange(40) >= 5, -100)
GREEDY = dict(input_ids=IDS[:, :5], max_new_tokens=20, min_new_tokens=20, do_sample=False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, prompt_lengths=5).logits


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    assert relative_error(logits(model), logits(other)) < (1e-12 if logits(model).dtype == torch.float64 else 1e-5)
    assert torch.equal(model.generate(**GREEDY), other.generate(**GREEDY))


# ---------------------------------------------------------------------------------------------------------- copies


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("when", ["new", "used", "trained", "checkpointing", "wrapped before", "the base model"])
def test_copies_stand_on_their_own(duplicate: Callable[[nn.Module], nn.Module], when: str) -> None:
    base = tiny_model("llama", torch.float32)  # the float64 ones have functions of the tests on them
    if when == "wrapped before":
        base.model.forward = functools.partial(type(base.model).forward, base.model)
    model = with_adapter(base, window_size=8)
    if when == "used":
        model.generate(**GREEDY)
    if when == "checkpointing":
        model.gradient_checkpointing_enable()
        model.get_base_model().disable_input_require_grads()  # transformers' own local function, with LoRA too
    if when in ("checkpointing", "trained"):
        model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    whole = model.get_base_model() if when == "the base model" else model
    twin = duplicate(whole)
    assert_alike(twin, whole)
    expected = logits(whole)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert torch.equal(logits(whole), expected) and not torch.equal(logits(twin), expected)
    del model, whole, base
    twin.generate(**GREEDY)  # nothing of it hangs on the original


@pytest.mark.parametrize("used", ["not at all", "generate", "train", "checkpointed", "truncated", "unloaded", "copied"])
def test_deleted_models_are_freed_at_once(used: str) -> None:
    """By reference counting alone: nobody waits for the garbage collector with a model's memory."""
    gc.collect()
    gc.disable()
    try:
        gradient = "truncated" if used == "truncated" else "full"
        model = with_adapter(tiny_model("llama"), window_size=8, gradient=gradient).train()
        if used == "checkpointed":
            model.gradient_checkpointing_enable()
        if used in ("train", "checkpointed", "truncated"):
            model(input_ids=IDS, labels=LABELS).loss.backward()
            sequence_logprobs(model, IDS, prompt_lengths=5)
        elif used == "generate":
            cache = PTECache()
            model.eval().generate(**GREEDY, past_key_values=cache)
            model.generate(**GREEDY, use_cache=False)
        elif used == "unloaded":
            model = model.unload()
        elif used == "copied":
            model = copy.deepcopy(model)
        weight = weakref.ref(next(p for name, p in model.named_parameters() if "down_proj" in name))
        del model
        assert weight() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------- wrapped by somebody else


def counting(method: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    """As accelerate, profilers and the like wrap a method."""

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return method(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_attached_again_after_somebody_wrapped_a_method(method: str, order: str) -> None:
    expected, calls = with_adapter(tiny_model("llama"), window_size=8), []
    base = tiny_model("llama")
    owner = base.model if method == "forward" else base
    if order in ("before", "both"):
        setattr(owner, method, counting(getattr(owner, method), calls))
    model = with_adapter(base, window_size=8)
    if order in ("after", "both"):
        setattr(owner, method, counting(getattr(owner, method), calls))
    assert_alike(model, expected)
    plain = model.unload()
    assert torch.equal(plain.generate(**GREEDY), tiny_model("llama").generate(**GREEDY))
    again = with_adapter(plain, window_size=8)
    del calls[:]
    assert_alike(again, expected)
    assert calls, "what somebody wrapped around is still called"
    other = with_adapter(again.unload(), window_size=4)  # a third time, under another window
    assert_alike(other, with_adapter(tiny_model("llama"), window_size=4))


def test_signatures_are_those_of_the_methods() -> None:
    import inspect

    base, model = tiny_model("llama"), with_adapter(tiny_model("llama"), window_size=8).get_base_model()
    for owner, wrapped in ((base.model, model.model), (base, model)):
        for name in ("forward", "generate"):
            if hasattr(type(owner), name):
                assert inspect.signature(getattr(wrapped, name)) == inspect.signature(getattr(owner, name))
                assert getattr(wrapped, name).__name__ == name


def test_a_base_with_lora() -> None:
    """On top of a LoRA that is not merged: as on the base with the LoRA merged."""
    torch.manual_seed(5)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    merged = with_adapter(copy.deepcopy(lora).merge_and_unload(), window_size=8)
    model = with_adapter(lora, window_size=8)
    assert relative_error(logits(model), logits(merged)) < 1e-6  # merging rounds
    assert torch.equal(model.generate(**GREEDY), merged.generate(**GREEDY))
    with model.disable_adapter():
        assert not torch.equal(logits(model), logits(merged))
    model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pte_" in name)


def test_a_compiled_base() -> None:
    model = with_adapter(torch.compile(tiny_model("llama"), backend="eager"), window_size=8)
    plain, options = with_adapter(tiny_model("llama"), window_size=8), GREEDY | dict(max_new_tokens=8, min_new_tokens=8)
    assert relative_error(logits(model), logits(plain)) < 1e-12
    assert torch.equal(model.generate(**options), plain.generate(**options))


# --------------------------------------------------------------------------------------- the same name once more


@pytest.mark.parametrize(
    "first, second",
    [
        (dict(state_update="sum"), dict(state_update="delta")),
        (dict(r=4), dict(r=6)),
        (dict(num_global_tokens=3), dict(num_global_tokens=0)),
        (dict(num_global_tokens=0), dict(num_global_tokens=3)),
        (dict(window_size=8), dict(window_size=4, retained_prefix=2)),
        (dict(pte_alpha=8), dict(pte_alpha=2)),
        (dict(encode_keys="post_rope"), dict()),
        (dict(target_modules=["q_proj", "v_proj"]), dict(target_modules=["k_proj"])),
        (dict(), dict(layers_to_transform=[1])),
        (dict(pte_dropout=0.5), dict(pte_dropout=0.0)),
    ],
    ids=str,
)
def test_the_second_cell_of_a_notebook(first: dict[str, Any], second: dict[str, Any], tmp_path) -> None:
    """`get_peft_model` twice on one base: nothing of the first adapter is left, in use or in the file."""
    base = tiny_model("llama")
    with_adapter(base, window_size=8, seed=3) if not first else with_adapter(base, **(dict(window_size=8) | first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, that there is an adapter already
        again = with_adapter(base, **(dict(window_size=8) | second))
    fresh = with_adapter(tiny_model("llama"), **(dict(window_size=8) | second))
    states = {name: p for name, p in again.named_parameters() if "pte_" in name}
    wanted = {name: p for name, p in fresh.named_parameters() if "pte_" in name}
    assert {name: p.shape for name, p in states.items()} == {name: p.shape for name, p in wanted.items()}
    assert settings(again) == settings(fresh)
    again.save_pretrained(tmp_path)
    assert_alike(PeftModel.from_pretrained(tiny_model("llama"), tmp_path), again)


def settings(model: nn.Module) -> dict[str, str]:
    """Of every module that has a live adapter, all that is no parameter."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ThoughtEncoder) and module.pte_rule:
            found[name] = str(module.pte_rule)
        elif isinstance(module, Linear) and module.pte_scaling:
            found[name] = f"{module.pte_scaling} {module.pte_dropout}"
    return found


def test_a_refused_second_adapter_leaves_the_first() -> None:
    base = tiny_model("llama")
    model = with_adapter(base, window_size=8)
    expected = logits(model)
    with pytest.raises(ValueError, match="not a projection of an attention module"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_adapter(base, window_size=4, target_modules=["q_proj", "up_proj"])
    model.peft_config["default"] = PTEConfig(window_size=8)
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------- hooks that see whole sequences


@pytest.mark.parametrize("gradient", ["full", "truncated"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_on_embeddings_is_that_of_whole_rows(gradient: str, checkpointing: bool) -> None:
    """NEFTune: noise of alpha / sqrt(L d), with L the length of the row, drawn once in a forward."""
    model = with_adapter(tiny_model("llama"), window_size=8, gradient=gradient).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    table, seen = model.get_input_embeddings(), []
    table.neftune_noise_alpha = 5.0
    table.register_forward_hook(neftune_post_forward_hook)
    table.register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=IDS, labels=LABELS).loss.backward()
    (noisy,) = seen
    assert noisy.shape == (2, 40, 32)
    noise = (noisy - table.weight[IDS]).abs().max()
    assert 0.9 < float(noise) / (5.0 / (40 * 32) ** 0.5) <= 1
    # The loss is that of these embeddings.
    table._forward_hooks.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model(inputs_embeds=noisy, labels=LABELS, prompt_lengths=5).loss
    table.register_forward_hook(lambda module, args, output: noisy)
    assert relative(model(input_ids=IDS, labels=LABELS).loss, expected) < 1e-12


def test_a_learned_hook_on_embeddings_gets_its_gradient() -> None:
    gradients = []
    for gradient in ("full", "truncated"):
        model = with_adapter(tiny_model("llama"), window_size=8, gradient=gradient).train()
        shift = nn.Parameter(torch.zeros(32, dtype=torch.float64))
        model.get_input_embeddings().register_forward_hook(lambda module, args, output, shift=shift: output + shift)
        model(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append(shift.grad)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_decoding_with_a_hook_on_embeddings() -> None:
    """A prompt that streams through the window is embedded once, whatever its segments."""
    model = with_adapter(tiny_model("llama"), window_size=6, retained_prefix=2)
    expected, seen = model.generate(**(GREEDY | dict(input_ids=IDS))), []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    assert torch.equal(model.generate(**(GREEDY | dict(input_ids=IDS))), expected)
    assert seen == [40] + [1] * 19


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs() / expected.abs())
