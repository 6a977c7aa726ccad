"""`pretrained_config`: updates on the scale of what the base's own attention gives, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, RELATIVES, relative_error, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model

from peft_pte import PTEConfig, pretrained_config
from peft_pte.families import attention_modules, find_decoder
from peft_pte.layer import Linear

IDS = torch.randint(3, 61, (2, 128), generator=torch.Generator().manual_seed(0))


def unequal(family: str) -> torch.nn.Module:
    """A base whose second layer's attention gives a hundred times more than its first one's."""
    base = tiny_model(family)
    for size, attention in zip((0.1, 10.0), attention_modules(find_decoder(base)).values()):
        output = getattr(attention, "o_proj", None) or attention.dense
        output.weight.data *= size
        if output.bias is not None:
            output.bias.data *= size
    return base


@pytest.mark.parametrize("family", [*FAMILIES, *RELATIVES])
def test_updates_are_on_the_scale_of_outputs(family: str, tmp_path: Path) -> None:
    """In every family: measured here on other tokens; the adapted model starts as the base, and is saved whole."""
    base = unequal(family).train()
    kept = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    config = pretrained_config(base, task_type="CAUSAL_LM", window_size=6, r=4, num_global_tokens=2)
    assert all(module.training for module in base.modules())
    assert not any(module._forward_hooks for module in base.modules())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.state_dict().items())
    assert config.write_gate and config.init_weights == "attention"
    base.eval()
    with torch.no_grad():
        expected = base(input_ids=IDS[:, :5]).logits
    model = get_peft_model(base, config).eval()
    projections = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(projections) == 2 and all(p.hidden_size is not None for p in projections)
    outputs: dict[Linear, torch.Tensor] = {}
    for projection in projections:
        projection.base_layer.register_forward_hook(lambda _, x, y, of=projection: outputs.update({of: y}))
    with torch.no_grad():
        actual = model(input_ids=IDS[:, :5], prompt_lengths=5).logits
        with model.disable_adapter():
            model(input_ids=IDS)
    assert relative_error(actual, expected) < 1e-12
    for projection, output in outputs.items():
        scaling = projection.pte_scaling["default"] / 8
        assert 0.7 < scaling / output[:, 4:].square().mean().sqrt() < 1.4
    first, second = (p.pte_scaling["default"] for p in projections)
    assert second > 10 * first
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(unequal(family), tmp_path)
    scalings = [m.pte_scaling["default"] for m in again.modules() if isinstance(m, Linear)]
    assert scalings == [first, second]


def test_fields_come_beside_these_or_instead() -> None:
    base = tiny_model("qwen2")
    usual = pretrained_config(base)
    assert list(usual.alpha_pattern) == [rf"layers\.{i}\.self_attn\.o_proj" for i in range(2)]
    last = pretrained_config(base, update_scale=16, layers_to_transform=[1], r=8)
    (name, alpha), (usual_name, usual_alpha) = *last.alpha_pattern.items(), list(usual.alpha_pattern.items())[1]
    assert name == usual_name and alpha == pytest.approx(usual_alpha * 16 / 8 * 8 / usual.r, rel=0.01)
    assert pretrained_config(base, layers_to_transform=1).alpha_pattern.keys() == {name}
    for own in (dict(alpha_pattern={"o_proj": 3}), dict(pte_alpha=3)):
        config = pretrained_config(base, write_gate=False, **own)
        assert config.scaling_of("model.layers.0.self_attn.o_proj") == 3 / config.r and not config.write_gate
    assert pretrained_config(base, exclude_modules=[r"model.layers.0.self_attn.o_proj"]).alpha_pattern.keys() == {name}
    queries = pretrained_config(base, target_modules=["q_proj"], init_weights=True)
    assert not queries.alpha_pattern
    get_peft_model(tiny_model("qwen2"), queries)
    wide = pretrained_config(base, target_modules=["q_proj", "o_proj"])
    assert wide.scaling_of("model.layers.0.self_attn.q_proj") == PTEConfig().pte_alpha / wide.r
    get_peft_model(base, wide)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(update_scale=0), "`update_scale` is 0, but must be a positive number"),
        (dict(update_scale=4, pte_alpha=4), "`update_scale` is 4, but `pte_alpha` is given too"),
        (dict(window_size=0), "`window_size` is 0, but must be"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained_config(tiny_model("llama"), **options)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_outputs_without_a_scale(value: float) -> None:
    base = tiny_model("llama")
    base.model.layers[1].self_attn.o_proj.weight.data.fill_(value)
    with pytest.raises(
        ValueError, match="'layers.1.self_attn.o_proj' of `base` gives outputs of a root mean square of"
    ):
        pretrained_config(base)
    assert pretrained_config(base, pte_alpha=4).pte_alpha == 4


def test_only_a_base_that_can_be_run() -> None:
    for config in (PTEConfig(task_type="CAUSAL_LM"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])):
        with pytest.raises(ValueError, match="with adapters, but must be the base model as it is"):
            pretrained_config(get_peft_model(tiny_model("llama"), config))
    with pytest.raises(ValueError, match="sharded, or on `meta`"):
        pretrained_config(tiny_model("llama").to("meta"))
