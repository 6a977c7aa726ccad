"""`export_lora`: until the first eviction the adapter is the LoRA that it writes; what no LoRA can be is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, relative_error, tiny_model, with_adapter
from peft import LoraConfig, PeftModel, get_peft_model

from peft_pte import export_lora

PROMPT, WINDOW = 7, 6
EXPRESSIBLE = dict(output_source="attention_output", output_gate=False, window_size=WINDOW, eviction_ratio=0.5)
SETTINGS: dict[str, dict[str, Any]] = {
    "delta": {},
    "gated writes": {"write_gate": True},
    "sum": {"state_update": "sum", "state_norm": "read"},
    "paper": {"state_update": "sum", "state_norm": "write", "state_norm_type": "frobenius", "conv_size": 1},
    "none": {"state_update": "none", "conv_size": 1},
    "without output projection": {"target_modules": ["q_proj", "v_proj"], "output_source": "hidden_states"},
    "one layer": {"layers_to_transform": [1]},
    "alphas of projections": {"alpha_pattern": {r"layers\.0\.self_attn\.[qv]_proj": 3, "o_proj": 0.5}},
    "embeddings": {"modules_to_save": ["lm_head"], "trainable_token_indices": [4, 9]},
}


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows with thoughts enough for one eviction, the second one left-padded."""
    ids = torch.randint(3, 61, (2, PROMPT + WINDOW + 1), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    return ids, mask


def compared(family: str, folder: Path, **config: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits under the adapter and under its LoRA, as stock PEFT loads it, and the mask."""
    model = with_adapter(tiny_model(family), **(EXPRESSIBLE | config))
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:  # modules that are saved in full differ from those of the base, too
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    export_lora(model, folder)
    ids, mask = rows()
    static = PeftModel.from_pretrained(tiny_model(family), folder, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        adapted = model(input_ids=ids, attention_mask=mask, prompt_lengths=PROMPT).logits
        return adapted, static(input_ids=ids, attention_mask=mask).logits, mask.bool()


@pytest.mark.parametrize("name", SETTINGS)
def test_until_the_first_eviction_it_is_the_lora(name: str, tmp_path: Path) -> None:
    """For the prompt and as many thoughts as the window holds, to the precision of float64; and not for one more."""
    adapted, static, mask = compared("qwen2", tmp_path, **SETTINGS[name])
    mask[:, -1] = False
    assert relative_error(static[mask], adapted[mask]) <= 1e-12
    assert relative_error(static[:, -1], adapted[:, -1]) > 1e-6  # a thought has left the adapter's cache


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tmp_path: Path) -> None:
    adapted, static, mask = compared(family, tmp_path)
    mask[:, -1] = False
    assert relative_error(static[mask], adapted[mask]) <= 1e-12


def test_it_is_an_ordinary_lora(tmp_path: Path) -> None:
    """Weights without pickle, and a configuration that says nothing of PTE."""
    export_lora(with_adapter(tiny_model("llama"), pte_dropout=0.25, **EXPRESSIBLE), tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "new" / "folder" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 5, 8, 0.25)


def test_a_chosen_adapter(tmp_path: Path) -> None:
    model = with_adapter(tiny_model("llama"), **EXPRESSIBLE)
    torch.manual_seed(8)
    model.add_adapter("other", model.peft_config["default"])
    export_lora(model, tmp_path / "first")
    export_lora(model, tmp_path / "other", adapter_name="other")
    first, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("first", "other"))
    assert len(first) == len(other) and first != other


@pytest.mark.parametrize(
    "config, reason",
    [({}, "hidden_states"), ({"output_gate": False}, "hidden_states"), ({**EXPRESSIBLE, "output_gate": True}, "gate")],
)
def test_what_no_lora_can_express_is_refused(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = with_adapter(tiny_model("llama"), **config)
    with pytest.raises(ValueError, match=rf"self_attn\.o_proj.*{reason}.*output_source='attention_output'"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM, but must be a PeftModel"):
        export_lora(tiny_model("llama"), tmp_path)
    model = with_adapter(tiny_model("llama"), **EXPRESSIBLE)
    with pytest.raises(ValueError, match=r"'second'.*\['default'\]"):
        export_lora(model, tmp_path, adapter_name="second")
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PTE adapters of this model are \[\]"):
        export_lora(lora, tmp_path)
