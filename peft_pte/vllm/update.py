"""New adapter weights for a running engine."""

from __future__ import annotations

import json
from typing import Any

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
    "window_size",
    "eviction_ratio",
    "eviction_policy",
    "retained_prefix",
    "state_update",
    "state_norm",
    "state_norm_type",
    "conv_size",
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
    # Bytes: they pass between processes whatever serialisation is allowed there.
    weights = save(adapter_weights(model, name))
    errors = llm.collective_rpc("pte_update_adapter", args=(json.dumps(fixed_fields(config)), weights))
    if any(errors):
        raise ValueError(next(filter(None, errors)))


class AdapterUpdates:
    """What workers of an engine can do in addition (`worker_extension_cls`)."""

    model_runner: Any  # the worker's

    def pte_update_adapter(self, fields: str, weights: bytes) -> str | None:
        """Take new weights. Returns what is wrong with them, if anything is."""
        model = self.model_runner.model
        here, new = fixed_fields(model.served.config), json.loads(fields)
        differing = [f"{name}={new[name]!r} (here {here[name]!r})" for name in here if new[name] != here[name]]
        if differing:
            return f"The adapter was made with another configuration than that of the engine: {', '.join(differing)}."
        try:
            model.load_adapter(load(weights))
        except ValueError as error:
            return str(error)
        return None
