"""The decoder's forward under the bounded cache (H2): step by step with a cache, as a replay without.

A wrapper of the decoder's forward adopts the cache, evicts, splits long inputs, and runs the replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache.cache import PTECache
from ..cache.eviction import evict
from ..cache.graph import ready_step, replayed_step
from ..compiling import decides, layers_uncompiled, uncompiled
from ..config import CachePolicy
from ..host import DecoderOutput, cache_in, call_with_cache, set_cache, take_cache
from ..layer import current_call
from ..replay.checkpointing import layer_checkpointing_off
from ..replay.chunks import num_chunks
from ..replay.heads import TaskOf, as_hidden, as_output, current_head, current_hidden, wants_hidden
from ..replay.replay import agreed_maximum, join_outputs, replay
from ..replay.segments import embedded_rows
from .border import HARNESSES, current_border, current_generation, named_arguments, prompt_length_of, warn_caller
from .calls import TURN_STREAMS, Facts, decide


@decides
def around_decoder(decoder: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward under the bounded cache. After an error in an attention module, no state stays behind."""
    try:
        return bounded_forward(decoder, original, *args, **kwargs)
    finally:
        current_call.set(None)


@decides
def bounded_forward(decoder: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """With a cache, step by step; without, as a replay."""
    if current_hidden.get() is not None:  # a head asks the top model for the logits of these
        return DecoderOutput(last_hidden_state=current_hidden.get())
    kwargs = named_arguments(type(decoder).forward, args, kwargs)
    attachment = decoder.pte_attachment
    policy, adapters = attachment.active()
    noted, wanted = current_border.get(), current_head.get()
    border = noted[1] if noted is not None and noted[0] is decoder else None
    task_of = None if wanted is None else functools.partial(wanted.task, attachment.top)
    if policy is None and wanted is not None and wanted.bounds_base:
        policy = attachment.resting_policy()
    if policy is None:
        return base_forward(decoder, original, border, task_of, kwargs)
    refuse_arguments(kwargs)
    inputs = take_inputs(kwargs)
    (x,) = inputs.values()
    batch_size, length = x.shape[:2]
    cache = take_cache(kwargs)
    use_cache, return_dict = (kwargs.pop(name, None) for name in ("use_cache", "return_dict"))
    kwargs["return_dict"] = True
    seen = cache.get_seq_length() if cache is not None else 0
    prompt_length = prompt_length_of(decoder, x, seen)
    facts = Facts(
        length=length,
        has_border=border is not None,
        is_generate=prompt_length is not None,
        has_cache=cache is not None,
        use_cache=use_cache,
        default_use_cache=decoder.config.use_cache,
        trains=attachment.trains(),
        wants_logprobs=task_of is not None,
    )
    call = decide(policy, facts)
    if call.warning is not None:
        warn_caller(call.warning, refused_in=HARNESSES)
    if call.kind == "cached":
        cache = PTECache.adopt(PTECache() if cache is None else cache)
        generation = current_generation.get()
        if facts.is_generate and generation is not None:
            cache.loop = generation.own_loop
        if call.border == "said":
            prompt_length = same_border(border)
        elif call.border == "generate" and cache.holds_thoughts:
            # With an integer prefix, everything streams anyway.
            if policy.retained_prefix == "prompt":
                warn_caller(TURN_STREAMS)
            prompt_length = None
        output = cached_forward(decoder, original, policy, adapters, cache, prompt_length, inputs, kwargs)
    else:
        if call.border in ("generate", "end", "start"):
            column = {"generate": prompt_length, "end": length, "start": 0}[call.border]
            border = torch.full((batch_size,), column)
        mask = kwargs.pop("attention_mask", None)
        position_ids = kwargs.pop("position_ids", None)
        positions = positions_of(position_ids, mask, length, 0, x.device)
        if position_ids is not None:
            refuse_packing(positions, mask)
        trained = [p for p in attachment.top.parameters() if p.requires_grad]
        output = replay(decoder, original, policy, border, task_of, inputs, mask, positions, trained, **kwargs)
    return output if return_dict is not False else output.to_tuple()


def same_border(border: torch.Tensor) -> int:
    """The one column at which the prompts of all rows end, [B] -> int.

    Raises:
        ValueError: they end at different columns.
    """
    if bool((border != border[0]).any()):
        raise ValueError(
            f"With a cache all prompts must end at the same column, but the borders are {border.tolist()}: "
            "pad prompts on the left, or leave `past_key_values` and `use_cache` out."
        )
    return int(border[0])


@decides
def base_forward(
    decoder: nn.Module,
    original: Callable[..., Any],
    border: torch.Tensor | None,
    task_of: TaskOf | None,
    kwargs: dict[str, Any],
) -> Any:
    """The decoder's own forward, with the adapter off: the base model with its full cache."""
    cache = cache_in(kwargs)
    if isinstance(cache, PTECache) and cache.is_bound:
        raise ValueError(
            "The PTE adapter is off, but `past_key_values` was filled with it on. The base model cannot go on from a "
            "bounded cache: start a new one."
        )
    output = original(**kwargs)
    if wants_hidden.get():
        return as_hidden(output.last_hidden_state)
    if task_of is None:
        return output
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    valid = torch.ones_like(ids).bool() if mask is None else mask.to(ids.device).bool()
    task = task_of(ids, valid, border)
    most = agreed_maximum(decoder, [num_chunks(*ids.shape)], ids.device)
    least = 0 if most is None else most[0]
    results = task.head(output.last_hidden_state, task.targets, task.needed, least_chunks=least)
    return as_output(output.last_hidden_state, results, valid)


@uncompiled
def take_inputs(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Take the one of `input_ids` [B, T] and `inputs_embeds` [B, T, D] that was given out of the call."""
    given = {name: kwargs.pop(name, None) for name in ("input_ids", "inputs_embeds")}
    inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
    if len(inputs) != 1:
        raise ValueError("You must specify exactly one of `input_ids` and `inputs_embeds`.")
    return inputs


@decides
def cached_forward(
    decoder: nn.Module,
    original: Callable[..., BaseModelOutputWithPast],
    policy: CachePolicy,
    adapters: tuple[str, ...],
    cache: PTECache,
    prompt_length: int | None,
    inputs: dict[str, torch.Tensor],
    kwargs: dict[str, Any],
) -> BaseModelOutputWithPast:
    """Feed any number of tokens to the cache; the result does not depend on how many come at once."""
    (x,) = inputs.values()
    batch_size, length = x.shape[:2]
    generation = current_generation.get()
    # A cache that a logits processor, say, uses in between belongs to a loop of its own.
    is_own_loop = generation is not None and generation.own_loop is cache.loop
    call = cache.loop if is_own_loop else None
    cache.bind(policy, adapters, decoder.config.num_hidden_layers, batch_size)
    seen = cache.get_seq_length()
    mask = kwargs.pop("attention_mask", None)
    if mask is not None and mask.shape != (batch_size, seen + length):
        raise ValueError(
            f"`attention_mask` has shape {tuple(mask.shape)}, but the cache has seen {seen} columns and the input "
            f"brings {length}: it must be {(batch_size, seen + length)}, evicted columns included."
        )
    positions = positions_of(kwargs.pop("position_ids", None), mask, length, seen, x.device).expand(batch_size, -1)
    cache.begin_prompt(mask, length, prompt_length)
    inputs = embedded_rows(decoder, inputs)
    outputs, start = [], 0
    while start < length:
        evict(cache, mask, decoder)
        end = min(length, start + cache.room())
        step = ready_step(decoder, cache, inputs, mask, kwargs, call)
        step_mask = None if step is not None else cache.compact_mask(mask, end - start)
        cache.begin_step(positions[:, start:end])
        if step is not None:
            output = step.go_on(cache, inputs["input_ids"], positions)
        else:
            output = replayed_step(decoder, original, cache, inputs, step_mask, positions, kwargs, call)
        if output is None:
            with layer_checkpointing_off(decoder), layers_uncompiled(decoder):
                output = call_with_cache(
                    decoder,
                    original,
                    cache,
                    **{name: tensor[:, start:end] for name, tensor in inputs.items()},
                    attention_mask=step_mask,
                    position_ids=positions[:, start:end],
                    use_cache=True,
                    **kwargs,
                )
        outputs.append(output)
        start = end
    output = join_outputs(outputs)
    set_cache(output, cache)
    return output


@uncompiled
def positions_of(
    position_ids: torch.Tensor | None, mask: torch.Tensor | None, length: int, seen: int, device: torch.device
) -> torch.Tensor:
    """Absolute positions [B or 1, length]: the caller's, or counted along the mask, so that padding does not count.

    Positions counted over padding would make a left-padded row another policy than the same row alone.
    """
    if position_ids is not None:
        if position_ids.ndim != 2 or position_ids.shape[1] != length:
            raise ValueError(
                f"`position_ids` has shape {tuple(position_ids.shape)}, but PTE needs one position for each of the "
                f"{length} tokens of a row: [batch, {length}]."
            )
        return position_ids.to(device)
    if mask is not None:
        return (mask.to(device).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(seen, seen + length, device=device)[None]


@uncompiled
def refuse_arguments(kwargs: dict[str, Any]) -> None:
    """Arguments of the decoder that PTE cannot honour."""
    packed = [
        name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx") if kwargs.get(name) is not None
    ]
    if packed:
        raise ValueError(
            f"PTE got `{packed[0]}`: packed (padding-free) batches and continuous batching put several sequences in "
            "one row, but there is one thought state per row. Use padded batches (`padding_free=False`, "
            "`packing=False`), and `generate` without `cache_implementation='paged'`."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        kind = f"{mask.ndim}-D tensor" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"`attention_mask` is a {kind}, but PTE needs the 2-D padding mask [batch, columns] (1 for tokens): it has "
            "to take the columns of evicted tokens out of it."
        )


@uncompiled
def refuse_packing(positions: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Positions that start again inside a row mean several sequences in one row."""
    steps = positions.diff(dim=-1)
    restarts = steps < 0
    if mask is not None:
        restarts = restarts & mask[:, 1:].to(positions.device).bool() & mask[:, :-1].to(positions.device).bool()
    if bool(restarts.any()):
        raise ValueError(
            "`position_ids` decrease inside a row, which means packed sequences. PTE keeps one thought state per row: "
            "use padded batches (`padding_free=False`, `packing=False`)."
        )
