"""vLLM's side of the plan: the state backend, which turns what the engine says of a step into pieces."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder

from .folder import served
from .plan import Part, Piece, plan


class PTEBackend(AttentionBackend):
    """One page a request and layer, as models with a recurrent state have it."""

    @staticmethod
    def get_name() -> str:
        return "PTE"

    @staticmethod
    def get_builder_cls() -> type[PTEMetadataBuilder]:
        return PTEMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


class PTEMetadataBuilder(AttentionMetadataBuilder):
    """Makes the plan of a step, once for all layers."""

    # The plan is made on the host, and differs from step to step.
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.served = served(vllm_config.model_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> list[Piece]:
        """The pieces of a step.

        Raises:
            RuntimeError: a prompt is longer than there are slots for it, or its length is not known. Requests are
                checked when they come in (plugin.py); this would be an engine that was started without that.
        """
        common = common_attn_metadata
        if common.rswa_prefix_lens is None:
            raise RuntimeError(
                "vLLM does not say how long the prompts are: `rswa_window` is missing in the model's configuration. "
                "Write the folder with `peft_pte.vllm.export`, or take `hf_overrides=peft_pte.vllm.overrides(...)`."
            )
        starts = common.query_start_loc_cpu.tolist()
        # Exact, without a wait for the device: it is an upper bound under speculative decoding only.
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        prompts = common.rswa_prefix_lens.tolist()
        pages = common.block_table_tensor[:, 0].tolist()
        parts = []
        for start, end, length, prompt, page in zip(starts, starts[1:], lengths, prompts, pages):
            if end > start:  # else it fills up a batch
                self.served.check_prompt(prompt, RuntimeError)
                parts.append(Part(page, start, end, length - (end - start), prompt))
        return plan(parts, self.served.config.cache_policy, self.device)
