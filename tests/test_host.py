"""The host's names: either name of the cache works, in models of any version of transformers."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from models import decode, relative_error, tiny_model, with_adapter
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from peft_pte import PTECache, host, sequence_logprobs
from peft_pte.families import attention_modules, find_decoder

IDS = torch.randint(3, 61, (2, 30), generator=torch.Generator().manual_seed(0))
OWN = host.CACHE_NAME
(OTHER,) = set(host.CACHE_NAMES) - {OWN}
WINDOW = dict(window_size=7, eviction_ratio=0.3)


def with_other_name(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that takes its cache under the other name, and only so."""

    def renamed(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if OWN in kwargs:
            raise TypeError(f"unexpected keyword argument {OWN!r}")
        return method(self, *args, **{OWN if name == OTHER else name: value for name, value in kwargs.items()})

    parameters = inspect.signature(method).parameters.values()
    renamed.__signature__ = inspect.Signature([p.replace(name=OTHER) if p.name == OWN else p for p in parameters])
    return renamed


def as_other_version(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose decoder and attention modules were written for a transformers that has the other name."""
    decoder = find_decoder(model)
    for module in (decoder, *attention_modules(decoder).values()):
        base = type(module)

        def call(self: torch.nn.Module, *args: Any, base: type = base, **kwargs: Any) -> Any:
            return base.__call__(self, *args, **{OTHER if k == OWN else k: value for k, value in kwargs.items()})

        members = dict(forward=with_other_name(base.forward), __call__=call)
        module.__class__ = type(f"Other{base.__name__}", (base,), members)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("other_version", [False, True])
def test_replay_is_decoding_whatever_the_name(other_version: bool, checkpointing: bool) -> None:
    base = tiny_model("llama")
    model = with_adapter(as_other_version(base) if other_version else base, **WINDOW)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    labels = IDS.masked_fill(torch.arange(30) < 5, -100)
    logits = model(input_ids=IDS, labels=labels).logits
    decoded, cache = decode(model.eval(), IDS, None, [5] + [1] * 25)
    assert relative_error(logits, decoded) <= 1e-10
    assert min(cache.num_evicted) > 10
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", host.CACHE_NAMES)
def test_callers_may_use_either_name(name: str) -> None:
    model = with_adapter(tiny_model("qwen2"), **WINDOW)
    options = dict(input_ids=IDS[:, :9], attention_mask=torch.ones(2, 9), max_new_tokens=20, do_sample=False)
    cache, other = PTECache(), DynamicCache()
    expected = model.generate(**options)
    assert torch.equal(model.generate(**options, **{name: cache}), expected)
    assert min(cache.num_evicted) > 0
    with torch.no_grad():
        output = model(input_ids=IDS, prompt_lengths=9, **{name: other}, use_cache=True)
        decoder_output = find_decoder(model)(IDS, **{name: PTECache()})
    assert output[OWN] is other and isinstance(other, PTECache)
    assert isinstance(decoder_output[OWN], PTECache)


def test_outputs_carry_the_cache_under_the_hosts_name() -> None:
    for output_class in (BaseModelOutputWithPast, CausalLMOutputWithPast):
        assert host.cache_name_of(output_class) == OWN and OWN in {field.name for field in fields(output_class)}
    output, cache = BaseModelOutputWithPast(last_hidden_state=IDS), PTECache()
    host.set_cache(output, cache)
    assert output[OWN] is cache
    host.set_cache(output, None)
    assert getattr(output, OWN) is None


def test_two_caches_under_two_names_are_refused() -> None:
    model = with_adapter(tiny_model("llama"))
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=IDS, cache=PTECache(), past_key_values=PTECache())
    cache = PTECache()
    assert host.cache_in({"cache": None, "past_key_values": cache}) is cache
    assert host.take_cache(arguments := {"cache": cache, "past_key_values": cache, "x": 1}) is cache
    assert arguments == {"x": 1}


def test_names_are_read_from_the_signature() -> None:
    assert host.cache_argument(lambda x, cache=None: None) == "cache"
    assert host.cache_argument(lambda x, past_key_values=None, **kwargs: None) == "past_key_values"
    assert host.cache_argument(lambda x, **kwargs: None) == OWN
    assert host.cache_argument(lambda x: None) is None
    renamed = host.rename_cache({"past_key_values": 1, "x": 2}, lambda x, cache: None)
    assert renamed == {"cache": 1, "x": 2}


def test_a_decoder_without_a_cache_is_refused_when_it_is_attached() -> None:
    model = tiny_model("llama")
    decoder = find_decoder(model)
    decoder.__class__ = type("NoCache", (type(decoder),), {"forward": lambda self, input_ids: None})
    with pytest.raises(ValueError, match=r"takes no cache under any name.* transformers \d+\.\d+.*tried: 5\.16\.1"):
        with_adapter(model)


@pytest.mark.parametrize("name, old", [("transformers", "5.3.0"), ("peft", "0.19.1")])
def test_versions_that_are_too_old_are_refused_by_number(name: str, old: str) -> None:
    pretend = (
        "import importlib.metadata as m\n"
        "version = m.version\n"
        f"m.version = lambda name: {old!r} if name == {name!r} else version(name)\n"
        "import peft_pte"
    )
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert f"ImportError: peft_pte needs {name} {host.OLDEST[name]} or later, but {old} is installed" in done.stderr


def test_the_error_about_a_lost_cache_names_its_causes() -> None:
    model = with_adapter(tiny_model("llama"))
    layer = find_decoder(model).layers[0]
    with pytest.raises(RuntimeError, match=r"Likely causes: .* Installed: transformers"):
        layer(torch.zeros(1, 2, 32, dtype=torch.float64), position_embeddings=(torch.zeros(1, 2, 8),) * 2)


@pytest.mark.filterwarnings("error:.*(past_key_values|`cache`):FutureWarning")
def test_the_package_itself_uses_no_deprecated_name(caplog: pytest.LogCaptureFixture) -> None:
    model = with_adapter(tiny_model("llama"), **WINDOW)
    labels = IDS.masked_fill(torch.arange(30) < 5, -100)
    model(input_ids=IDS, labels=labels).loss.backward()
    sequence_logprobs(model, IDS, prompt_lengths=5)[0].sum().backward()
    model.generate(input_ids=IDS, max_new_tokens=20, do_sample=False)
    with torch.no_grad(), model.disable_adapter():
        model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert "deprecated" not in caplog.text
