"""A configuration for a pretrained base: updates of the outputs of its attention, on the scale of these."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .config import PTEConfig
from .families import attention_modules, find_decoder
from .layer import device_of, is_sharded_tensor
from .model import hidden_size_at, is_linear

UPDATE_SCALE = 8.0
NUM_ROWS, NUM_TOKENS, FIRST = 2, 128, 4  # random tokens, and how many of a row are left out: first ones draw attention


def pretrained_config(base: nn.Module, update_scale: float = UPDATE_SCALE, **fields: Any) -> PTEConfig:
    """The configuration with which a pretrained base learned facts soonest (docs/evidence.md).

    The output projections of all layers are adapted, with `write_gate=True` and `init_weights="attention"`. What the
    base's attention adds to the residual stream is tens of times larger in some layers than in others, and an update of
    one size for all moves nothing in some of them: so `alpha_pattern` makes the scaling of each layer `update_scale`
    times the root mean square of what its output projection gives. For this the base runs once, over 256 random tokens.
    In a process group all processes call this, and have what the first one measures.

    Args:
        base: a transformers model with its weights, without adapters.
        update_scale: larger ones learn sooner, and may let gradients explode.
        fields: of `PTEConfig`, beside these or instead of them; `pte_alpha` or `alpha_pattern` instead of what is
            measured.

    Raises:
        ValueError: `base` has adapters, its weights are sharded or on `meta`, or its outputs zero or not finite;
            `update_scale` is not positive; or what `PTEConfig` refuses.

    Example:

    ```py
    >>> base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-3B-Instruct")
    >>> model = get_peft_model(base, pretrained_config(base, task_type="CAUSAL_LM", window_size=1024))
    ```
    """
    if not update_scale > 0:
        raise ValueError(f"pretrained_config: `update_scale` is {update_scale!r}, but must be a positive number.")
    own = sorted(fields.keys() & {"pte_alpha", "alpha_pattern"})
    if own and update_scale != UPDATE_SCALE:
        raise ValueError(
            f"pretrained_config: `update_scale` is {update_scale!r}, but `{own[0]}` is given too, instead of what is "
            "measured: leave one of them out."
        )
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            f"pretrained_config: `base` is a {type(base).__name__} with adapters, but must be the base model as it is: "
            "call this before `get_peft_model`."
        )
    if any(parameter.is_meta or is_sharded_tensor(parameter) for parameter in base.parameters()):
        raise ValueError(
            f"pretrained_config: `base` is a {type(base).__name__} whose weights are sharded, or on `meta`, but it is "
            "to be run: call this on a model that is loaded whole, and keep the configuration."
        )
    decoder = find_decoder(base)
    outputs = dict(output_projections(decoder))
    settings: dict[str, Any] = dict(
        target_modules={name.rpartition(".")[2] for name in outputs}, write_gate=True, init_weights="attention"
    )
    config = PTEConfig(**(settings | fields))
    if not own:
        before = next(f"{name}." if name else "" for name, module in base.named_modules() if module is decoder)
        config.alpha_pattern = {
            # Three digits are enough, and can be read.
            re.escape(name): float(f"{config.r * update_scale * size:.3g}")
            for name, size in output_sizes(decoder, outputs).items()
            if check_target_module_exists(config, before + name)
        }
    return config


def output_projections(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Of the attention modules, with their names in the decoder."""
    for path, attention in attention_modules(decoder).items():
        for name, child in attention.named_children():
            if is_linear(child) and hidden_size_at(attention, name) is not None:
                yield f"{path}.{name}", child


@torch.no_grad()
def output_sizes(decoder: nn.Module, projections: dict[str, nn.Module]) -> dict[str, float]:
    """The root mean square of what each of them gives over random tokens, which differs little from that over text.

    Raises:
        ValueError: it is zero, or not finite.
    """
    sizes, embedding = {}, decoder.get_input_embeddings()
    ids = torch.randint(embedding.num_embeddings, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))

    def note(name: str) -> Any:
        def noted(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            sizes[name] = output[:, FIRST:].float().square().mean().sqrt()

        return noted

    hooks = [module.register_forward_hook(note(name)) for name, module in projections.items()]
    trained = [module for module in decoder.modules() if module.training]
    try:
        decoder.eval()
        decoder(input_ids=ids.to(device_of(embedding)), use_cache=False)
    finally:
        for module in trained:
            module.training = True
        for hook in hooks:
            hook.remove()
    found = [{name: sizes[name].item() for name in projections}]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found)  # their rounding may differ, but not their policies
    for name, value in found[0].items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"pretrained_config: '{name}' of `base` gives outputs of a root mean square of {value}, so there is no "
                "scale to take from them: load the weights first, in a dtype that holds them, or give `pte_alpha`."
            )
    return found[0]
