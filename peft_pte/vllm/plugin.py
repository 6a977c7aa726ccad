"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`), and what it may not be asked for."""

from __future__ import annotations

import functools
import logging
from typing import Any, NoReturn

from .folder import ARCHITECTURES, served

logger = logging.getLogger(__name__)
# The rooms of vLLM that are entered here are no public interface.
TESTED = "0.32.0"


def register() -> None:
    """Make models and state backend known to vLLM. A repeated call does nothing.

    In a vLLM that is built in another way than the version that was tested, this says so in the log and does nothing:
    an error here would stop vLLM for all models, and ours are unknown to it then.
    """
    import vllm

    try:
        from vllm.exceptions import VLLMValidationError
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
        from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend
        from vllm.v1.engine.input_processor import InputProcessor

        process = InputProcessor.process_inputs
    except (ImportError, AttributeError) as error:
        version = getattr(vllm, "__version__", "of an unknown version")
        logger.error(
            f"No PTE under vLLM {version}: peft_pte.vllm was tested with {TESTED}, and does not fit ({error})."
        )
        return
    if "PTE" in MambaAttentionBackendEnum.__members__:
        return
    register_backend("PTE", f"{__package__}.metadata.PTEBackend", is_mamba=True)

    class PTEModelConfig(MambaModelConfig):
        """One page a request, for as many tokens as there may be; called before anything is started."""

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            refuse(vllm_config)
            vllm_config.cache_config.mamba_block_size = vllm_config.model_config.max_model_len
            super().verify_and_update_config(vllm_config)
            parallel = vllm_config.parallel_config
            parallel.worker_extension_cls = parallel.worker_extension_cls or f"{__package__}.update.AdapterUpdates"

    for architecture in ARCHITECTURES.values():
        ModelRegistry.register_model(architecture, f"{__package__}.models:PTEForCausalLM")
        MODELS_CONFIG_MAP[architecture] = PTEModelConfig

    @functools.wraps(process)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if self.model_config.architecture in ARCHITECTURES.values():
            prompt = request.prompt_embeds if request.prompt_token_ids is None else request.prompt_token_ids
            served(self.model_config).check_prompt(len(prompt), VLLMValidationError)
            if request.resumable:
                raise VLLMValidationError(
                    "PTE under vLLM does not support prompts that come in while thoughts are generated (streaming "
                    "input): the border between them would move. Send a request with the whole prompt."
                )
        return request

    # The one place in which a single request can be refused; later, the engine would stop with it.
    InputProcessor.process_inputs = checked


def refuse(vllm_config: Any) -> None:
    """Raise `ValueError` for what PTE cannot do under vLLM."""
    from vllm.platforms import current_platform

    def no(option: str, reason: str) -> NoReturn:
        raise ValueError(f"PTE under vLLM does not support {option}: {reason}")

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if vllm_config.cache_config.enable_prefix_caching:
        no("`enable_prefix_caching=True`", "a state cannot be put together from blocks. Leave it out.")
    if vllm_config.cache_config.cache_dtype != "auto":
        no(f"`kv_cache_dtype={vllm_config.cache_config.cache_dtype!r}`", "keys are encoded as they are. Leave it out.")
    if vllm_config.speculative_config is not None:
        no("`speculative_config`", "evicted thoughts cannot be taken back. Leave it out.")
    if vllm_config.lora_config is not None:
        no("`enable_lora`", "its layers would be put around projections that have an update already. Leave it out.")
    if vllm_config.kv_transfer_config is not None:
        no("`kv_transfer_config`", "connectors move blocks of keys and values, and no states. Leave it out.")
    for option in ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, option, 1) > 1:
            no(f"`{option}={getattr(parallel, option)}`", "all heads of a layer are encoded together. Leave it at 1.")
    if not (model.enforce_eager or current_platform.is_cpu()):
        # Captured without a plan, a step would be one without attention.
        no("CUDA graphs", "evictions are decided on the host. Set `enforce_eager=True`.")
    if model.runner_type != "generate":
        no(f"`runner={model.runner_type!r}`", "it serves generation only.")
    served(model)  # which says what is missing
    refuse_base(model.hf_config, no)


def refuse_base(config: Any, no: Any) -> None:
    """The same for the base model. `no(what, reason)` raises."""
    if config.model_type not in ARCHITECTURES:
        no(f"models of type {config.model_type!r}", f"only {', '.join(ARCHITECTURES)}.")
    types = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    if types or not getattr(config, "is_causal", True):
        no(f"layers of type {', '.join(sorted(types)) or 'bidirectional'}", "all must have full causal attention.")
    if getattr(config, "dual_chunk_attention_config", None):
        no("`dual_chunk_attention_config`", "its keys have no single position.")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") in ("dynamic", "longrope"):
        no(f"`rope_type={rope['rope_type']!r}`", "it depends on the length of a sequence.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        no(f"`partial_rotary_factor={rope['partial_rotary_factor']}`", "the families here rotate whole heads.")
