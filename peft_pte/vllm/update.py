"""New adapter weights for a running engine."""

from __future__ import annotations

import base64
import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from ..config import PTEConfig
from ..static import pte_adapter
from .folder import adapter_weights

# What an engine is built on; all else is only of training.
FIXED_FIELDS = (
    "r",
    "num_global_tokens",
    "pte_alpha",
    "alpha_pattern",
    "window_size",
    "eviction_ratio",
    "eviction_policy",
    "retained_prefix",
    "state_update",
    "state_norm",
    "state_norm_type",
    "conv_size",
    "write_gate",
    "output_source",
    "output_gate",
    "encode_keys",
)


def fixed_fields(config: PTEConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FIXED_FIELDS}


def update_adapter(llm: Any, model: nn.Module, adapter_name: str | None = None) -> None:
    """Send an adapter's weights into a running engine, in place and by name; nothing is merged.

    The next request is computed with the new weights. The engine must be idle: a request that goes on would carry what
    was encoded with the old ones.

    Args:
        llm: a `vllm.LLM` that serves an adapter of the same configuration, in this process or not.
        model: a `PeftModel` with the adapter, on any device; all weights are gathered there.
        adapter_name: None: the active one.

    Raises:
        ValueError: requests are unfinished, the model has no such adapter, or it differs from the engine's in its
            configuration or its weights; then nothing has changed.
    """
    name, config = pte_adapter(model, adapter_name)
    if llm.llm_engine.has_unfinished_requests():
        raise ValueError(
            "`llm` has unfinished requests, which would go on with what was encoded by the old weights. Let them "
            "finish, or abort them, before the update."
        )
    errors = llm.collective_rpc("pte_update_adapter", args=update_arguments(model, name, config))
    if any(errors):
        raise ValueError(next(filter(None, errors)))


def update_arguments(model: nn.Module, adapter_name: str, config: PTEConfig) -> tuple[str, str]:
    """What `pte_update_adapter` takes: text, which passes between processes and through a server as it is."""
    weights = base64.b64encode(save(adapter_weights(model, adapter_name))).decode()
    return json.dumps(fixed_fields(config)), weights


class AdapterUpdates:
    """What workers of an engine can do in addition (`worker_extension_cls`)."""

    model_runner: Any  # the worker's

    def pte_update_adapter(self, fields: str, weights: str) -> str | None:
        """Take new weights, see `update_arguments`. Returns what is wrong with them, if anything is."""
        model = self.model_runner.model
        here, new = fixed_fields(model.served.config), json.loads(fields)
        differing = [f"{name}={new[name]!r} (here {here[name]!r})" for name in here if new[name] != here[name]]
        if differing:
            return f"The adapter was made with another configuration than that of the engine: {', '.join(differing)}."
        try:
            model.load_adapter(load(base64.b64decode(weights)))
        except ValueError as error:
            return str(error)
        return None

    def pte_note_before_cuts(self) -> str | None:
        """From now on, log-probabilities of sampled tokens are those at the temperature, before top-k, top-p and min-p.

        That is the policy which is trained. vLLM's own `logprobs_mode` has them before the temperature or after the
        cuts. Penalties and logits processors have acted, as on what `generate` notes for `SampledLogProbs`.
        Returns what is in the way, if anything is.
        """
        from vllm.v1.sample.sampler import Sampler

        sampler = self.model_runner.sampler
        if type(sampler) is not Sampler:
            return f"vLLM draws tokens with {type(sampler).__qualname__}, which is not the sampler that is known here."
        sample = Sampler.sample

        def noted(logits: torch.Tensor, metadata: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
            scaled = logits.float()
            if metadata.temperature is not None:
                greedy = metadata.temperature < 1e-5  # vLLM's own bound; they have no temperature
                scaled = scaled / metadata.temperature.masked_fill(greedy, 1.0)[:, None]
            logprobs = scaled.log_softmax(-1)  # first: `sample` writes into the logits
            return sample(sampler, logits, metadata, *args, **kwargs)[0], logprobs

        sampler.sample = noted  # a repeated call puts the same in its place
        return None
