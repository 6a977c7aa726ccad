"""Parameters may be elsewhere, or on `meta`, while a module does not compute: accelerate's offloading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from models import relative_error, tiny_model, with_adapter

from peft_pte import PTECache, sequence_logprobs

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0)
GREEDY = dict(input_ids=IDS[:, :12], attention_mask=MASK[:, :12], max_new_tokens=24, min_new_tokens=24, do_sample=False)
CPU = torch.device("cpu")


def offload(model: torch.nn.Module, way: str, folder: Path) -> None:
    if way == "cpu":
        cpu_offload(model, execution_device=CPU)
    elif way == "cpu, buffers too":
        cpu_offload(model, execution_device=CPU, offload_buffers=True)
    elif way == "disk":
        disk_offload(model, str(folder), execution_device=CPU)
    elif way == "emptied":
        empty_after_calls(model)
    else:  # as `device_map="auto"` does with what does not fit
        parts = {name: "cpu" for name, _ in model.named_children()}
        decoder = next(name for name, module in model.named_modules() if hasattr(module, "rotary_emb"))
        parts = {f"{decoder}.{name}": "cpu" for name, _ in model.get_submodule(decoder).named_children()}
        parts |= {name: "cpu" for name, _ in model.named_modules() if name.endswith("lm_head")}
        parts.pop(f"{decoder}.layers")
        parts |= {f"{decoder}.layers.0": "cpu", f"{decoder}.layers.1": "disk"}
        dispatch_model(model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def empty_after_calls(model: torch.nn.Module) -> None:
    """As ZeRO-3 does: weights are there while their own module is called, and the tensors themselves are emptied."""
    weights = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in weights:
        parameter.ds_id, parameter.data = 0, torch.empty(0, dtype=parameter.dtype)

    def fill(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = weights[parameter]

    def empty(module: torch.nn.Module, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    for module in model.modules():
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty)


@pytest.mark.parametrize("way", ["cpu", "cpu, buffers too", "disk", "a part on disk", "emptied"])
@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(retained_prefix=2),
        dict(state_update="sum", state_norm="write"),
        dict(num_global_tokens=0),
        dict(encode_keys="chunk"),
        dict(state_update="none"),
    ],
    ids=str,
)
def test_offloaded_models_compute_the_same(way: str, config: dict[str, Any], tmp_path: Path) -> None:
    model = with_adapter(tiny_model("llama", torch.float32), window_size=6, **config)
    expected = model.generate(**GREEDY)
    with torch.no_grad():
        logprobs, _ = sequence_logprobs(model, IDS, MASK, 12)
        logits = model(input_ids=IDS, attention_mask=MASK, prompt_lengths=12).logits
    offload(model, way, tmp_path)
    assert any(p.is_meta or not p.numel() for name, p in model.named_parameters() if "pte_" in name)
    cache = PTECache()
    assert torch.equal(model.generate(**GREEDY, past_key_values=cache), expected)
    assert min(cache.num_evicted) > 6 and all(norms.isfinite().all() for norms in cache.state_norms().values())
    with torch.no_grad():
        assert torch.allclose(sequence_logprobs(model, IDS, MASK, 12)[0], logprobs, atol=1e-5)
        offloaded = model(input_ids=IDS, attention_mask=MASK, prompt_lengths=12).logits
    assert relative_error(offloaded, logits) < 1e-5
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert sequence_logprobs(model, IDS, MASK, 12)[0].isfinite().all()


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_an_adapter_on_an_offloaded_base(way: str, tmp_path: Path) -> None:
    """Its parameters are made where the computation is. (Those of a LoRA stay on `meta` and are lost.)"""
    expected = with_adapter(tiny_model("llama", torch.float32), window_size=6)
    base = tiny_model("llama", torch.float32)
    offload(base, way, tmp_path)
    model = with_adapter(base, window_size=6)
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.generate(**GREEDY), expected.generate(**GREEDY))
