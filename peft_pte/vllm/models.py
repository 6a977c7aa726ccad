"""The language models under vLLM: its own, with our attention layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM

from .attention import PTEAttention
from .folder import engine_name, served


class PTEForCausalLM(LlamaForCausalLM):
    """Llama, and Qwen2 and Qwen3, which differ from it in their attention layers only."""

    has_inner_state: ClassVar[bool] = True
    # For vLLM: the cache holds states of a fixed size, and no keys and values that grow.
    is_attention_free: ClassVar[bool] = True
    supports_lora: ClassVar[bool] = False
    supports_pp: ClassVar[bool] = False

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        layer_type = functools.partial(LlamaDecoderLayer, attn_layer_type=PTEAttention)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        self.served = served(vllm_config.model_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The base model's weights come from vLLM, the adapter's from its own folder."""
        loaded = super().load_weights(weights)
        adapter = load_file(self.served.folder / SAFETENSORS_WEIGHTS_NAME)
        adapter = {engine_name(name): weight for name, weight in adapter.items()}
        self.load_adapter(adapter)
        return loaded | set(adapter)

    def load_adapter(self, weights: dict[str, torch.Tensor]) -> None:
        """Replace the adapter's weights in place; all of them, or none.

        Raises:
            ValueError: a weight is missing, is not there to be replaced, or has another shape.
        """
        parameters = dict(self.named_parameters())
        own = {name for name in parameters if ".low_rank." in name or ".thought_encoder." in name}
        if differing := own ^ set(weights):
            raise ValueError(f"The adapter and the model differ in their weights: {sorted(differing)}.")
        for name, weight in weights.items():
            if weight.shape != parameters[name].shape:
                raise ValueError(f"{name} is {list(weight.shape)}, but here {list(parameters[name].shape)}.")
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
