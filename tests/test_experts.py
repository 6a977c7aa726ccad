"""Mixtures of experts: every way through the model works, and the router's loss sees the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from float64 import make_exact_float64
from models import SIZES, relative_error, with_adapter
from torch import nn

from peft_pte import PTECache, sequence_logprobs

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "Mixtral": dict(num_local_experts=4),
    "Olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "GraniteMoe": dict(num_local_experts=4),
}
IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
LABELS = IDS.where((torch.arange(40) >= 8) & MASK.bool(), -100)


def mixture(family: str, aux: bool = False, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]), output_router_logits=aux)
    settings._experts_implementation = "eager"  # the others have no float64
    base = getattr(transformers, f"{family}ForCausalLM")(settings).double().eval()
    make_exact_float64(base)
    return with_adapter(base, window_size=8, **config)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("aux", [False, True])
def test_every_way_through_the_model(family: str, aux: bool) -> None:
    model = mixture(family, aux)
    model.get_base_model().config.output_router_logits = False  # the families' own code fails in padded steps with it
    out = model.generate(input_ids=IDS[:, :8], attention_mask=MASK[:, :8], max_new_tokens=32, min_new_tokens=32)
    model.get_base_model().config.output_router_logits = aux
    mask = torch.cat([MASK[:, :8], torch.ones(2, 32, dtype=torch.long)], dim=1)
    with torch.no_grad():
        logits = model(input_ids=out, attention_mask=mask, prompt_lengths=8).logits
        logprobs, _ = sequence_logprobs(model, out, mask, 8)
    expected = logits[:, :-1].log_softmax(-1).gather(-1, out[:, 1:, None])[..., 0]
    torch.testing.assert_close(logprobs[:, 8:], expected[:, 7:])
    model.train()(input_ids=IDS, attention_mask=MASK, labels=LABELS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_are_those_of_decoding(family: str) -> None:
    """Joined across segments and in the caller's layout, so that the auxiliary loss is that of the whole batch."""
    model = mixture(family, aux=True)
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
        joined = [x.unflatten(0, (2, 40)) for x in out.router_logits]
        for row, start in enumerate((3, 0)):  # each alone, since steps with padding have no router logits
            cache, steps = PTECache(), []
            for columns in (slice(start, 8), *(slice(i, i + 1) for i in range(8, 40))):
                steps.append(model(input_ids=IDS[row : row + 1, columns], past_key_values=cache).router_logits)
            for layer, parts in zip(joined, zip(*steps)):
                assert relative_error(layer[row, start:], torch.cat(parts)) < 1e-10
    assert out.aux_loss > 0


def test_the_router_s_loss_has_its_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = mixture("Mixtral", aux=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS).aux_loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_truncated_gradients_refuse_the_router_s_loss() -> None:
    model = mixture("Mixtral", aux=True, gradient="truncated").train()
    with pytest.raises(ValueError, match="router logits were asked for"):
        model(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    model.get_base_model().config.output_router_logits = False
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS, output_router_logits=False).loss.backward()


def test_trl_trains_a_mixture_with_its_router_s_loss(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL is an optional dependency: pip install peft-pte[trl]")
    datasets = pytest.importorskip("datasets")
    from test_trl import COMMON, PTE, tokenizer

    from peft_pte import PTEConfig

    rows = [dict(prompt="w5 w6 w7", completion=" ".join(f"w{8 + (i + j) % 4}" for j in range(20))) for i in range(16)]
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**(SIZES | FAMILIES["Qwen3Moe"]), output_router_logits=True)
    trainer = trl.SFTTrainer(
        model=transformers.Qwen3MoeForCausalLM(config),
        processing_class=tokenizer(),
        args=trl.SFTConfig(output_dir=str(tmp_path), learning_rate=3e-2, **(COMMON | dict(max_steps=6))),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=PTEConfig(**PTE),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"] and all(entry["aux_loss"] > 0 for entry in logs)
