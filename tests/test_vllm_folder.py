"""What is written for vLLM, without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import tiny_model, with_adapter
from peft import LoraConfig, get_peft_model

from peft_pte import PTEConfig
from peft_pte.vllm import export, overrides
from peft_pte.vllm.folder import base_weights, engine_name, served, weight_names
from peft_pte.vllm.plugin import refuse_base


def saved(folder: Path, family: str = "qwen2", **config: Any) -> Any:
    """A model with an adapter, and both in folders."""
    base = tiny_model(family, torch.float32)
    base.save_pretrained(folder / "base")
    model = with_adapter(base, **config)
    model.save_pretrained(folder / "adapter")
    return model


def model_config(folder: Path) -> Any:
    """As vLLM has it."""
    return SimpleNamespace(
        model=str(folder), hf_config=SimpleNamespace(**json.loads((folder / "config.json").read_text()))
    )


@pytest.mark.parametrize("how", ["folders", "models", "a second adapter"])
def test_a_folder_holds_base_and_adapter(how: str, tmp_path: Path) -> None:
    model = saved(tmp_path, window_size=8)
    base: Any = tmp_path / "base"
    adapter: Any = tmp_path / "adapter"
    (tmp_path / "base" / "pytorch_model.bin").write_text("a pickle")
    if how == "models":
        base, adapter = tiny_model("qwen2", torch.float32), model
    if how == "a second adapter":
        model.add_adapter("second", PTEConfig(r=7, window_size=8))
        model.set_adapter("second")
        adapter = model
    assert export(base, adapter, tmp_path / "served", max_prompt_length=77) == tmp_path / "served"
    found = served(model_config(tmp_path / "served"))
    assert (found.max_prompt_length, found.config.window_size) == (77, 8)
    assert found.config.r == (7 if how == "a second adapter" else 5)
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert (config["architectures"], config["rswa_window"]) == (["PTEQwen2ForCausalLM"], 8)
    assert config["hidden_size"] == 32
    files = {path.suffix for path in (tmp_path / "served").rglob("*") if path.is_file()}
    assert files <= {".safetensors", ".json", ".md"}
    names = weight_names(found.folder)
    assert "model.layers.1.self_attn.low_rank.q_proj.A" in names
    assert "model.layers.0.self_attn.thought_encoder.pte_key.default.weight" in names


def test_a_base_is_served_where_it_is(tmp_path: Path) -> None:
    saved(tmp_path, "llama", window_size="prompt")
    found = overrides(tmp_path / "base", tmp_path / "adapter", max_prompt_length=50)
    assert found["architectures"] == ["PTELlamaForCausalLM"]
    assert found["rswa_window"] == 50
    config = SimpleNamespace(model=str(tmp_path / "base"), hf_config=SimpleNamespace(pte=found["pte"]))
    assert served(config).folder == tmp_path / "adapter"


def test_prompts_that_are_too_long(tmp_path: Path) -> None:
    saved(tmp_path, window_size=8)
    export(tmp_path / "base", tmp_path / "adapter", tmp_path / "served", max_prompt_length=30)
    found = served(model_config(tmp_path / "served"))
    found.check_prompt(30, ValueError)
    with pytest.raises(ValueError, match="31 tokens.*`max_prompt_length` is 30.*max_prompt_length=31"):
        found.check_prompt(31, ValueError)
    streaming = found._replace(config=PTEConfig(retained_prefix=4))
    streaming.check_prompt(31, ValueError)


def refused(place: Path, match: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
    defaults = dict(base=place / "base", adapter=place / "adapter", folder=place / "served")
    with pytest.raises(error, match=match):
        export(**(defaults | arguments))
    assert not (place / "served").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    """With the reason, and before anything is written."""
    model = saved(tmp_path)
    refused(tmp_path, "not empty", folder=tmp_path / "base")
    refused(tmp_path, "`max_prompt_length` is 0", max_prompt_length=0)
    refused(tmp_path, "PeftModelForCausalLM with an adapter", base=model)
    refused(tmp_path, "Qwen2ForCausalLM with an adapter", base=model.base_model.model)
    refused(tmp_path, "type 'mistral'", base=tiny_model("mistral", torch.float32))
    refused(tmp_path, "no adapter_config.json", FileNotFoundError, adapter=tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    refused(tmp_path, r"no \*.safetensors", FileNotFoundError)
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    refused(tmp_path, "PEFTType.LORA|PeftType.LORA|'LORA'|type LORA", adapter=tmp_path / "lora")
    refused(tmp_path, r"PTE adapters of this model are \[\]", adapter=lora)
    more = with_adapter(tiny_model("qwen2"), modules_to_save=["lm_head"])
    refused(tmp_path, "lm_head.*`modules_to_save`", adapter=more)
    with pytest.raises(ValueError, match="`pte` = None.*peft_pte.vllm.export"):
        served(SimpleNamespace(model="base", hf_config=SimpleNamespace()))


def test_an_adapter_that_is_saved_again_is_read_again(tmp_path: Path) -> None:
    """By the next engine; one that runs keeps what it was built on."""
    first = saved(tmp_path, window_size=8)
    folder = export(tmp_path / "base", first, tmp_path / "served")
    running = model_config(folder)
    assert served(running).config.window_size == 8
    with_adapter(tiny_model("qwen2", torch.float32), window_size=9).save_pretrained(folder / "adapter")
    assert served(model_config(folder)).config.window_size == 9
    assert served(running).config.window_size == 8


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_of_the_base_have_their_own_names(family: str) -> None:
    base = tiny_model(family, torch.float32)
    own = {name: weight.clone() for name, weight in base.named_parameters()}
    found = dict(base_weights(with_adapter(base)))
    assert set(found) == set(own) and all(torch.equal(found[name], weight) for name, weight in own.items())


def test_names_of_weights() -> None:
    prefix = "base_model.model.model.layers.3.self_attn"
    here = "model.layers.3.self_attn"
    assert engine_name(f"{prefix}.o_proj.pte_gate.weight") == f"{here}.low_rank.o_proj.gate"
    assert (
        engine_name(f"{prefix}.thought_encoder.pte_key_conv.weight")
        == f"{here}.thought_encoder.pte_key_conv.default.weight"
    )
    with pytest.raises(ValueError, match="qkv_proj"):
        engine_name(f"{prefix}.qkv_proj.pte_A.weight")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "mistral"}, "'mistral'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"is_causal": False}, "bidirectional"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "0.5"),
    ],
    ids=str,
)
def test_bases_that_are_refused(changes: dict[str, Any], reason: str) -> None:
    def no(what: str, why: str) -> None:
        raise ValueError(f"{what}: {why}")

    plain = dict(model_type="qwen2", layer_types=["full_attention"] * 2, rope_parameters={"rope_theta": 1e4})
    refuse_base(SimpleNamespace(**plain), no)
    with pytest.raises(ValueError, match=reason):
        refuse_base(SimpleNamespace(**(plain | changes)), no)
