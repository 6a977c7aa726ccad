"""Where PTE meets the Hugging Face model: on the model itself, since several callers go around the tuner.

(H1) forward hooks on the top model find the prompt border in `prompt_lengths`, `labels` or `logits_to_keep`;
(H2) a wrapper of the decoder's forward adopts the cache, evicts, splits long inputs, and runs the replay;
(H3) hooks on each attention module hand the state to its projections and take it back;
(H4) a wrapper of `generate` refuses what cannot work and makes the prompt length known (generation.py).

Nothing is kept between calls except in the cache. The border travels from the top model to the decoder in a context
variable, because callers such as fused loss heads call the decoder on their own.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..cache.cache import PTECache
from ..cache.graph import replayed_step
from ..compiling import decides, uncompiled
from ..config import CachePolicy, PTEConfig
from ..encoder import ENCODER_NAME, ThoughtEncoder
from ..families import SPLIT_PROJECTIONS
from ..host import CACHE_NAMES, cache_in, call_with_cache, rename_cache, set_cache, take_cache, versions
from ..layer import AttentionCall, Linear
from ..replay.heads import (
    Head,
    as_output,
    current_head,
    current_hidden,
    first_labels,
    needed_columns,
    num_chunks,
    token_logprobs,
)
from ..replay.replay import agreed_maximum, join_outputs, replay
from ..replay.segments import layer_checkpointing_off

# (decoder, border [B]) while the top model's forward runs; (decoder, columns of the prompt) while `generate` runs.
current_border: ContextVar[tuple[nn.Module, torch.Tensor | None] | None] = ContextVar("pte_border", default=None)
current_prompt: ContextVar[tuple[nn.Module, int] | None] = ContextVar("pte_prompt", default=None)

UNKNOWN_BORDER = (
    "PTE cannot tell where the prompt ends and the thoughts begin, and the input ({length} tokens) is longer than the "
    "window (window_size={window!r}). Pass `prompt_lengths` ([batch], the column of each row at which its completion "
    "begins) or `labels` (-100 on the prompt). If the whole input is a prompt, pass `use_cache=True` or wrap the call "
    "in `torch.no_grad()` with the cache on."
)
LIBRARIES = {"peft_pte", "peft", "torch", "transformers", "accelerate"}
GUESSED_PROMPT = (
    "PTE was called outside of `generate` with more tokens than its window (window_size={window!r}), and nothing says "
    "where the prompt ends. All of them are taken as a prompt, which is never evicted: these are logits of the full "
    "cache, not of the policy that `generate` samples from. To score a text, pass `prompt_lengths` ([batch], the "
    "column of each row at which its completion begins) or `labels` (-100 on the prompt), or use "
    "`peft_pte.sequence_logprobs`; in lm-evaluation-harness, `python -m peft_pte -m lm_eval --model pte-hf`. If it is "
    "a prompt, pass `use_cache=True`."
)


class Attachment:
    """What the hooks know about a model: its parts, and the configurations by adapter name.

    A plain object on the top model and on the decoder (`pte_attachment`), so that its references are no submodules;
    a deepcopy of the model takes a matching copy along.
    """

    def __init__(self, top: nn.Module, decoder: nn.Module):
        self.top, self.decoder = top, decoder
        self.configs: dict[str, PTEConfig] = {}
        self.encoders: list[ThoughtEncoder] = []
        self.handles: list[Any] = []

    def active(self) -> tuple[CachePolicy | None, tuple[str, ...]]:
        """The cache policy of the live adapters, None if PTE is off, and their names.

        Raises:
            ValueError: adapters with different policies are active together.
        """
        names = tuple(dict.fromkeys(name for encoder in self.encoders for name in encoder.live_adapters))
        policies = {name: self.configs[name].cache_policy for name in names}
        if len(set(policies.values())) > 1:
            raise ValueError(
                f"The active adapters want different caches, but there is one for all of them: {policies}. Activate "
                "one at a time with `set_adapter`, or give them the same window_size, eviction_ratio, retained_prefix, "
                "gradient and offload."
            )
        return (policies[names[0]] if names else None), names

    def trains(self) -> bool:
        """Whether this call builds a graph for the adapter's parameters."""
        return torch.is_grad_enabled() and any(p.requires_grad for e in self.encoders for p in e.parameters())


def warn_caller(message: str) -> None:
    """Warn, once for each place outside of the libraries from which the model was called."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


@uncompiled
def named_arguments(method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name."""
    if not args:  # transformers calls by name, for every token
        return kwargs
    return {**dict(zip(list(signature(method).parameters)[1:], args)), **kwargs}


# ------------------------------------------------------------------------------------------------ H1: the prompt border


@uncompiled
def find_border(top: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the top model: take `prompt_lengths` out of the call and note the border."""
    attachment = top.pte_attachment
    prompt_lengths = kwargs.pop("prompt_lengths", None)
    border = None
    policy, _ = attachment.active()
    if policy is not None or current_head.get() is not None:
        call = named_arguments(type(top).forward, args, kwargs)
        border = border_of(call, prompt_lengths, keeps_prompt=policy is not None and policy.retained_prefix == "prompt")
    current_border.set((attachment.decoder, border))
    return args, kwargs if policy is None else rename_cache(kwargs, type(top).forward)


@uncompiled
def forget_border(top: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the top model, called on errors too."""
    current_border.set(None)


def border_of(call: dict[str, Any], prompt_lengths: Any, keeps_prompt: bool) -> torch.Tensor | None:
    """The caller's column of each row's first thought, [B], or None if the call does not say.

    In this order: `prompt_lengths`; the first label that is not -100 (a row without any takes the batch's minimum),
    also where labels are those of the last `logits_to_keep` columns (ms-swift cuts them so); an int `logits_to_keep`
    above 1 (TRL's way to ask for the logits of the completion and of the token before it).
    """
    x = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    past = cache_in(call)
    if x is None or (past is not None and past.get_seq_length()):
        if prompt_lengths is not None:
            raise ValueError("`prompt_lengths` was given with a cache that holds tokens: its prompt border is known.")
        return None
    batch_size, length = x.shape[:2]
    if prompt_lengths is not None:
        border = torch.as_tensor(prompt_lengths, device=x.device)
        border = border.expand(batch_size) if border.ndim == 0 else border
        if (
            border.shape != (batch_size,)
            or border.is_floating_point()
            or not ((border >= 0) & (border <= length)).all()
        ):
            raise ValueError(
                f"`prompt_lengths` must hold one integer in [0, {length}] for each of the {batch_size} rows (the "
                f"column at which the completion begins, padding counted), got {prompt_lengths!r}."
            )
        return border.long()
    labels, logits_to_keep = call.get("labels"), call.get("logits_to_keep")
    kept = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep < length else length
    if isinstance(labels, torch.Tensor) and labels.shape in ((batch_size, length), (batch_size, kept)):
        labels = torch.nn.functional.pad(labels.to(x.device), (length - labels.shape[1], 0), value=-100)
        border = first_labels(labels)
        if bool((border == length).all()):
            return None
        mask = call.get("attention_mask")
        if keeps_prompt and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            num_prompt = border if mask is None else mask[:, :length].to(x.device).cumsum(-1).gather(1, border[:, None])
            if bool((num_prompt <= (mask is not None)).all()):
                warn_caller(
                    "The labels cover whole sequences, so PTE keeps no prompt: everything streams through the window. "
                    "Set the labels of the prompt to -100, or pass `prompt_lengths`."
                )
            warn_of_turns(labels, border, mask)
        return border
    if isinstance(logits_to_keep, int) and logits_to_keep > 1:
        return torch.full((batch_size,), max(0, length - (logits_to_keep - 1)), device=x.device)
    return None


def warn_of_turns(labels: torch.Tensor, border: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Say what several turns in a row mean: the first label is the border, whatever comes after it."""
    columns = torch.arange(labels.shape[1], device=labels.device)
    labelled = labels != -100
    last = torch.where(labelled, columns, -1).amax(-1, keepdim=True)
    between = ~labelled & (columns > border[:, None]) & (columns < last)
    if mask is not None:
        between &= mask[:, : labels.shape[1]].to(labels.device).bool()
    if bool(between.any()):
        warn_caller(
            "The labels have gaps: several turns, of which only the assistant's are learned. PTE takes what is before "
            "the first label as the prompt; later turns, of the user too, stream through the window like thoughts. A "
            "served chat, where every answer is a `generate` of its own, keeps the whole history as its prompt: to "
            "train that, make a row of each answer, with the history before it as its prompt."
        )


# ------------------------------------------------------------------------------------------- H2: the decoder's forward


@decides
def around_decoder(decoder: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward under the bounded cache: with a cache, step by step; without, as a replay."""
    if current_hidden.get() is not None:  # a head asks the top model for the logits of these
        return BaseModelOutputWithPast(last_hidden_state=current_hidden.get())
    kwargs = named_arguments(type(decoder).forward, args, kwargs)
    attachment = getattr(decoder, "pte_attachment", None)
    if attachment is None:  # detached, but somebody's wrapper around ours is still there
        return original(**kwargs)
    policy, adapters = attachment.active()
    noted, wanted = current_border.get(), current_head.get()
    border = noted[1] if noted is not None and noted[0] is decoder else None
    head = None if wanted is None else functools.partial(token_logprobs, attachment.top, wanted.temperature)
    if policy is None:
        return base_forward(decoder, original, border, head, kwargs)
    refuse_arguments(kwargs)
    inputs = take_inputs(kwargs)
    (x,) = inputs.values()
    batch_size, length = x.shape[:2]
    cache = take_cache(kwargs)
    explicit_cache, return_dict = (kwargs.pop(name, None) for name in ("use_cache", "return_dict"))
    kwargs["return_dict"] = True
    use_cache = decoder.config.use_cache if explicit_cache is None else explicit_cache
    prompt = current_prompt.get()
    prompt_length = prompt[1] if prompt is not None and prompt[0] is decoder else None
    if cache is None and border is None and prompt_length is not None and not use_cache:
        border = torch.full((batch_size,), min(prompt_length, length), device=x.device)  # generate(use_cache=False)

    # Without a border a call with the cache on is a prefill, unless it looks like training. Where nothing is evicted
    # the border makes no difference.
    makes_cache = cache is None and use_cache and (border is None or explicit_cache)
    if cache is None and border is None:
        keeps_prompt = policy.retained_prefix == "prompt"
        num_kept = 0 if keeps_prompt else policy.retained_prefix
        fits = policy.window_size != "prompt" and length <= num_kept + policy.window_size
        makes_cache = makes_cache and bool(fits or explicit_cache or not attachment.trains())
        if keeps_prompt and not makes_cache:
            if not fits:
                raise ValueError(UNKNOWN_BORDER.format(length=length, window=policy.window_size))
            # The whole row may count as prompt; a head is asked for all of it.
            border = torch.full((batch_size,), length if head is None else 0, device=x.device)
        elif keeps_prompt and not (fits or explicit_cache or prompt_length is not None):
            warn_caller(GUESSED_PROMPT.format(window=policy.window_size))
    if makes_cache:
        cache = PTECache()
    if cache is not None:
        cache = PTECache.adopt(cache)
        if border is not None and not cache.is_bound:
            if bool((border != border[0]).any()):
                raise ValueError(
                    f"With a cache all prompts must end at the same column, but the borders are {border.tolist()}: "
                    "pad prompts on the left, or leave `past_key_values` and `use_cache` out."
                )
            prompt_length = int(border[0])
        output = cached_forward(decoder, original, policy, adapters, cache, prompt_length, inputs, kwargs)
    else:
        mask = kwargs.pop("attention_mask", None)
        position_ids = kwargs.pop("position_ids", None)
        positions = positions_of(position_ids, mask, length, 0, x.device)
        if position_ids is not None:
            refuse_packing(positions, mask)
        trained = [p for p in attachment.top.parameters() if p.requires_grad]
        output = replay(decoder, original, policy, border, head, inputs, mask, positions, trained, **kwargs)
    return output if return_dict is not False else output.to_tuple()


@decides
def base_forward(
    decoder: nn.Module,
    original: Callable[..., Any],
    border: torch.Tensor | None,
    head: Head | None,
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
    if head is None:
        return output
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    needed = needed_columns(torch.ones_like(ids).bool() if mask is None else mask.bool(), border)
    most = agreed_maximum(decoder, [num_chunks(*ids.shape)], ids.device)
    if most is not None:
        head = functools.partial(head, least_chunks=most[0])
    return as_output(output.last_hidden_state, *head(output.last_hidden_state, ids.roll(-1, dims=1), needed))


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
    outputs, start = [], 0
    while start < length:
        cache.evict(mask, decoder)
        end = min(length, start + cache.room())
        step_mask = cache.compact_mask(mask, end - start)
        cache.begin_step(positions[:, start:end])
        with layer_checkpointing_off(decoder):
            output = replayed_step(decoder, original, cache, inputs, step_mask, positions, kwargs)
            if output is None:
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


# ------------------------------------------------------------------------------- H3: the state, for one attention call


def hand_over_state(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: encode what was evicted, and hand S to the projections."""
    encoder = getattr(attention, ENCODER_NAME)
    if not encoder.live_adapters:
        return
    cache = cache_in(kwargs)
    layer = cache.layers[attention.layer_idx] if cache is not None else None
    if not hasattr(layer, "states_for"):
        raise RuntimeError(
            f"Layer {attention.layer_idx} was called without PTE's cache (got {type(cache).__name__}), so its thoughts "
            "would be lost in silence. Likely causes: the decoder's layers are called on their own instead of the "
            "model; the decoder's `forward` was replaced after the adapter was attached; a gradient checkpointing of "
            f"somebody else's drops the cache; or the model's code hands its cache on under a name other than "
            f"{' or '.join(map(repr, CACHE_NAMES))}. Installed: {versions()}."
        )
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    states = layer.states_for(encoder, attention, hidden_states.shape[0])
    adapted = {name: child for name, child in attention.named_children() if isinstance(child, Linear)}
    call = AttentionCall(states, [adapted[name] for name in SPLIT_PROJECTIONS if name in adapted])
    for projection in adapted.values():
        projection.call = call


def take_state_back(attention: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of an attention module, called on errors too: nothing stays in the modules."""
    for projection in attention.children():
        if isinstance(projection, Linear):
            projection.call = None
