"""The static part of an adapter, S_0 alone, as an ordinary LoRA for programs that know nothing of PTE."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .config import PTEConfig
from .encoder import ENCODER_NAME, ThoughtEncoder, full_precision
from .layer import Linear

# What both configurations have, with the same meaning.
SHARED_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "trainable_token_indices",
)


@torch.no_grad()
def export_lora(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write the static part of an adapter as an ordinary PEFT LoRA.

    Until the first thought leaves the window the state is S_0 (Eq. 6), so that PTE is the LoRA `A S_0 B` (Eq. 5): with
    `lora_A` = S_0 B, `lora_B` = A and the same scaling. What is written equals the adapter for the prompt and the first
    `window_size` thoughts. Behind them it knows nothing of what PTE encodes, and keeps everything in its cache.

    Args:
        model: a `PeftModel` with a PTE adapter, in any dtype; weights are written in the adapter's.
        folder: is made if need be; gets `adapter_config.json` and `adapter_model.safetensors`.
        adapter_name: None: the active one.

    Raises:
        ValueError: the model has no such adapter, or a projection is adapted in a way that no LoRA has: it is asked
            with something else than its own input (`output_source="hidden_states"`), or gated (`output_gate`).
    """
    name, config = pte_adapter(model, adapter_name)
    others = get_peft_model_state_dict(model, adapter_name=name)
    weights = {key: weight for key, weight in others.items() if ".pte_" not in key}  # modules saved in full
    for path, attention in model.named_modules():
        encoder = attention._modules.get(ENCODER_NAME)
        if encoder is not None and name in encoder.pte_rule:
            state = initial_state_of(encoder, name)
            for child, projection in attention.named_children():
                if isinstance(projection, Linear) and projection.has_adapter(name):
                    refuse_others(f"{path}.{child}", projection, name)
                    B, A = projection.pte_B[name].weight, projection.pte_A[name].weight
                    weights[f"{path}.{child}.lora_A.weight"] = (state.to(B.dtype) @ B).contiguous()
                    weights[f"{path}.{child}.lora_B.weight"] = A.contiguous()
    lora = LoraConfig(
        lora_alpha=config.pte_alpha,
        alpha_pattern=dict(config.alpha_pattern),
        lora_dropout=config.pte_dropout,
        inference_mode=True,
        **{field: getattr(config, field) for field in SHARED_FIELDS},
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lora.save_pretrained(str(folder))
    tensors = {key: weight.detach().cpu() for key, weight in weights.items()}
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def pte_adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, PTEConfig]:
    """Name and configuration of an adapter; None: the active one.

    Raises:
        ValueError: the model has no such PTE adapter.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"`model` is a {type(model).__name__}, but must be a PeftModel with a PTE adapter.")
    name = model.active_adapter if adapter_name is None else adapter_name
    config = model.peft_config.get(name)
    if not isinstance(config, PTEConfig):
        adapters = [known for known, other in model.peft_config.items() if isinstance(other, PTEConfig)]
        raise ValueError(f"`adapter_name` is {name!r}, but the PTE adapters of this model are {adapters}.")
    return name, config


def initial_state_of(encoder: ThoughtEncoder, name: str) -> torch.Tensor:
    """The state before any eviction as projections read it, [r, r]."""
    with full_precision():
        return encoder.read(name, encoder.start(name, 1))[0]


def refuse_others(path: str, projection: Linear, name: str) -> None:
    """Raise `ValueError` if what is added to this projection is no product of its own input with a constant."""
    config = "PTEConfig(output_source='attention_output', output_gate=False)"
    if not projection.pte_reads_input[name]:
        reason = "is asked with the input of its attention module (`output_source='hidden_states'`)"
    elif name in projection.pte_gate:
        reason = "has a gate (`output_gate=True`)"
    else:
        return
    raise ValueError(
        f"Adapter {name!r} cannot be exported as a LoRA: the update of '{path}' {reason}, which a LoRA cannot express. "
        f"Train with {config}, or without the output projection among `target_modules`; or serve the adapter itself "
        "(see docs/vllm.md)."
    )
