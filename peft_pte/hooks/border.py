"""Where the prompt ends and the thoughts begin (H1): what a call of the top model says about it.

The border travels from the top model to the decoder in a context variable, because callers such as fused loss heads
call the decoder on their own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import nn

from ..compiling import uncompiled
from ..host import cache_in, rename_cache
from ..replay.heads import current_head, first_labels

# (decoder, border [B]) while the top model's forward runs; (decoder, columns of the prompt) while `generate` runs.
current_border: ContextVar[tuple[nn.Module, torch.Tensor | None] | None] = ContextVar("pte_border", default=None)
current_prompt: ContextVar[tuple[nn.Module, int] | None] = ContextVar("pte_prompt", default=None)

LIBRARIES = {"peft_pte", "peft", "torch", "transformers", "accelerate"}


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
