"""`generate` under PTE (H4): what cannot work is refused before any token is made."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationMixin

from ..cache.cache import PTECache, refuse_rollback
from ..host import cache_in, rename_cache
from .border import Generation, current_generation, named_arguments


class SampledLogProbs:
    """Log-probabilities of the tokens that a `generate` call draws, without keeping any logits but the last.

    It is handed to `generate` both as a logits processor, which sees the logits, and as a stopping criterion, which
    sees the token that was drawn; noted in `current_recorder`. Logits are divided by `temperature` and not changed
    otherwise, as in TRL's log-probabilities.
    """

    def __init__(self, temperature: float):
        self.temperature = temperature
        self.tokens: list[torch.Tensor] = []
        self._distribution: torch.Tensor  # of the token that is about to be drawn

    def process(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        self._distribution = (logits.float() / self.temperature).log_softmax(-1)
        return logits

    def note(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens.append(self._distribution.gather(-1, input_ids[:, -1:])[:, 0])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def rows(self, lengths: list[int]) -> list[list[float]]:
        """The first `lengths[b]` log-probabilities of row b."""
        table = torch.stack(self.tokens, dim=1).tolist()
        return [row[:length] for row, length in zip(table, lengths, strict=True)]


current_recorder: ContextVar[SampledLogProbs | None] = ContextVar("pte_recorder", default=None)

GROWING = "_update_model_kwargs_for_generation"  # adds a column to the mask

REFUSED_GENERATION = {
    "prompt_lookup_num_tokens": "prompt-lookup decoding rolls the cache back, but evicted thoughts cannot come back",
    "assistant_early_exit": "assisted decoding rolls the cache back, but evicted thoughts cannot come back",
    "dola_layers": "DoLa reads the logits of layers that have not seen the same thoughts",
    "guidance_scale": "classifier-free guidance runs a second prompt beside the first, without its own thought state",
}


def around_generate(top: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate`: refuse what PTE cannot honour before any token is made, and make the prompt length known."""
    attachment = top.pte_attachment
    if attachment.active()[0] is None:
        return original(*args, **kwargs)
    refuse_ungathered(top)
    call = named_arguments(type(top).generate, args, kwargs)
    configs = (call.get("generation_config"), top.generation_config)
    sources = [call, *(vars(config) for config in configs if config is not None)]

    def option(name: str) -> Any:
        return next((source[name] for source in sources if source.get(name) is not None), None)

    if call.get("assistant_model") is not None:
        refuse_rollback()
    for name, reason in REFUSED_GENERATION.items():
        if option(name) is not None and not (name == "guidance_scale" and option(name) == 1):
            raise ValueError(f"`{name}={option(name)!r}` is not supported with PTE: {reason}. Leave it out.")
    implementation = option("cache_implementation")
    if implementation not in (None, "dynamic", "dynamic_full"):
        raise ValueError(
            f"`cache_implementation={implementation!r}` is not supported with PTE, whose cache is bounded already: "
            "static, offloaded, quantised and paged caches would lose the thoughts. Leave it out."
        )
    cache = cache_in(call)
    if cache is not None:
        PTECache.adopt(cache)
    inputs = call.get("inputs_embeds")
    for name in ("input_ids", "inputs"):
        inputs = call.get(name) if inputs is None else inputs
    # Without inputs, `generate` starts from the BOS token.
    is_own = option("custom_generate") is None and getattr(type(top), GROWING, None) is getattr(
        GenerationMixin, GROWING
    )
    token = current_generation.set(Generation(attachment.decoder, inputs, object() if is_own else None))
    args, kwargs = (), rename_cache(dict(call), type(top).generate)
    recorder = current_recorder.get()
    if recorder is not None:
        for name, function in (("logits_processor", recorder.process), ("stopping_criteria", recorder.note)):
            kwargs[name] = [*(call.get(name) or ()), function]
    try:
        return original(*args, **kwargs)
    finally:
        current_generation.reset(token)


def refuse_ungathered(top: nn.Module) -> None:
    """FSDP2 gathers what it has sharded in `forward`, and nothing in `generate`, which calls the model inside of it.

    Raises:
        RuntimeError: the embeddings are still sharded; said by name, since torch's own words are about operators.
    """
    if not dist.is_available():
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    embeddings = top.get_input_embeddings()
    if isinstance(embeddings, FSDPModule) or not isinstance(embeddings.weight, DTensor):
        return
    if any(isinstance(module, FSDPModule) for module in top.modules()):
        raise RuntimeError(
            "`generate` was called on a model that FSDP2 (`fully_shard`) has sharded and not gathered: it gathers "
            "parameters in `forward` only. Call `torch.distributed.fsdp.register_fsdp_forward_method(model, "
            "'generate')` once after `fully_shard(model)`, for the module that you call `generate` on."
        )


def around_continuous_batching(top: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`generate_batch` and relatives run on a paged cache that knows no thoughts."""
    if top.pte_attachment.active()[0] is not None:
        raise ValueError(
            "Continuous batching (`generate_batch`, paged attention) is not supported with PTE: its cache holds no "
            "thought states. Use `generate` with a left-padded batch."
        )
    return original(*args, **kwargs)


GENERATION_METHODS = {
    "generate": around_generate,
    "generate_batch": around_continuous_batching,
    "init_continuous_batching": around_continuous_batching,
}
