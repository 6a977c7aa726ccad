"""An engine in the process of a model that is being trained, with that model's weights."""

from __future__ import annotations

import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from vllm import LLM
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..static import pte_adapter
from .folder import adapter_weights, add_entries, base_weights, entries, saved_in

LOAD_FORMAT = "pte_model_in_memory"
current_model: ContextVar[PeftModel] = ContextVar("pte_model_in_memory")


@register_model_loader(LOAD_FORMAT)
class MemoryLoader(BaseModelLoader):
    """Takes the base model's weights from `current_model`; the adapter's come from its folder, as ever."""

    def download_model(self, model_config: Any) -> None:
        """Nothing is to be fetched."""

    def load_weights(self, model: Any, model_config: Any) -> None:
        model.load_weights((name, weight.detach()) for name, weight in base_weights(current_model.get()))


def colocated_engine(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int, **options: Any
) -> LLM:
    """An engine with the weights of a model in memory: no checkpoint is read or written, but the adapter's.

    Args:
        model: its active adapter is served. Weights are copied; `update_adapter` sends later ones.
        tokenizer: for its end-of-sequence token and for stop strings.
        max_prompt_length: as of `peft_pte.vllm.export`.
        options: of `vllm.LLM`. Model, tokenizer and how they are loaded are set here. The engine must run in this
            process: `distributed_executor_backend="external_launcher"`, or VLLM_ENABLE_V1_MULTIPROCESSING=0.

    Raises:
        ValueError: as `export`; or the base model is quantised.
    """
    name, config = pte_adapter(model, None)
    adapter_weights(model, name)  # which refuses modules that were saved in full
    base = model.get_base_model()
    if getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None):
        raise ValueError(
            "The base model is quantised, and its weights cannot be handed to vLLM: load it without "
            "`quantization_config`, or roll out with `generate` (`use_vllm=False`)."
        )
    added = entries(base.config.model_type, saved_in(name), config, max_prompt_length)
    with tempfile.TemporaryDirectory() as name_of_folder:  # all of it is read while the engine is built
        folder = Path(name_of_folder)
        base.config.save_pretrained(folder)
        add_entries(folder, added)
        base.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder / "adapter", selected_adapters=[name])
        token = current_model.set(model)
        try:
            return LLM(str(folder), load_format=LOAD_FORMAT, **options)
        finally:
            current_model.reset(token)
