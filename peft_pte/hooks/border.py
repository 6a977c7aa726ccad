"""Where the prompt ends and the thoughts begin (H1): what a call of the top model says about it.

The border travels from the top model to the decoder in a context variable, because callers such as fused loss heads
call the decoder on their own. So does what surrounds a call and knows more: `generate` its prompt, a trainer its batch.
What it knows holds for the same tokens only: a logits processor or a critic that calls the model on another text inside
of `generate` has its own prompt.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn

from ..compiling import uncompiled
from ..host import cache_in, rename_cache
from ..replay.heads import current_head, first_labels
from ..replay.layout import checked_lengths


class Generation(NamedTuple):
    """A `generate` that is running.

    `prompt`: [B, P] or [B, P, D], None for the BOS token alone. `own_loop`: stands for this call if its loop is
    transformers' own, which adds valid columns to the mask and does nothing else; else None.
    """

    decoder: nn.Module
    prompt: torch.Tensor | None
    own_loop: object | None


# (decoder, border [B]) while the top model's forward runs.
current_border: ContextVar[tuple[nn.Module, torch.Tensor | None] | None] = ContextVar("pte_border", default=None)
current_generation: ContextVar[Generation | None] = ContextVar("pte_generation", default=None)
# (tokens [B, T], border [B]) of the batch that a trainer computes its loss of.
current_batch: ContextVar[tuple[torch.Tensor, torch.Tensor] | None] = ContextVar("pte_batch", default=None)

LIBRARIES = {"peft_pte", "peft", "torch", "transformers", "accelerate"}
# Programs that score texts: a warning scrolls by, and the figures stay.
HARNESSES = {"lm_eval": "run it as `python -m peft_pte -m lm_eval ...`, or `import peft_pte.lm_eval` in your script"}


def warn_caller(message: str, refused_in: dict[str, str] | None = None) -> None:
    """Warn, once for each place outside of the libraries from which the model was called.

    Raises:
        RuntimeError: that place is in one of the programs `refused_in`, for which it says what to do.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    program = frame.f_globals.get("__name__", "").partition(".")[0]
    if refused_in is not None and program in refused_in:
        raise RuntimeError(f"{message} This call is {program}'s: {refused_in[program]}.")
    warnings.warn(message, stacklevel=level)


@uncompiled
def named_arguments(method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a method call by name."""
    if not args:  # transformers calls by name, for every token
        return kwargs
    return {**dict(zip(list(signature(method).parameters)[1:], args)), **kwargs}


@uncompiled
def prompt_length_of(decoder: nn.Module, x: torch.Tensor, seen: int) -> int | None:
    """The columns of the prompt of the `generate` that calls the decoder with `x` [B, q(, D)] after `seen` columns.

    None if there is none, if its prompt is over, or if `x` is another text.
    """
    generation = current_generation.get()
    if generation is None or generation.decoder is not decoder:
        return None
    prompt = generation.prompt
    if prompt is None:
        return 1 if seen == 0 and x.shape[1] == 1 else None
    rest = prompt[:, seen : seen + x.shape[1]]
    if not rest.shape[1] or rest.ndim != x.ndim or x.shape[0] % rest.shape[0]:
        return None
    # `generate` repeats rows for beams and for several answers.
    rest = rest.repeat_interleave(x.shape[0] // rest.shape[0], dim=0).to(x.device)
    return prompt.shape[1] if torch.equal(x[:, : rest.shape[1]], rest) else None


@contextlib.contextmanager
def batch_known(input_ids: torch.Tensor, prompt_lengths: torch.Tensor) -> Iterator[None]:
    """Calls of the model on these tokens [B, T] know where prompts end ([B], as `prompt_lengths`), if nothing else
    says so."""
    token = current_batch.set((input_ids, prompt_lengths))
    try:
        yield
    finally:
        current_batch.reset(token)


def border_of_batch(x: torch.Tensor) -> torch.Tensor | None:
    """The border [B] of tokens that a trainer has made known."""
    known = current_batch.get()
    if known is None:
        return None
    ids, border = known
    same = ids.shape == x.shape and torch.equal(ids.to(x.device), x)
    return border.to(x.device) if same else None


@uncompiled
def find_border(top: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook of the top model: take `prompt_lengths` out of the call and note the border."""
    attachment = top.pte_attachment
    if getattr(top, "_is_replica", False):
        raise RuntimeError(
            "PTE does not support `torch.nn.DataParallel`, which `Trainer` uses by itself where it sees several GPUs: "
            "it copies a model for every call, while the adapter's hooks belong to one model. Start one process for "
            "each GPU (`accelerate launch -m peft_pte script.py`), or show the script one GPU only "
            "(`CUDA_VISIBLE_DEVICES=0`)."
        )
    prompt_lengths = kwargs.pop("prompt_lengths", None)
    border = None
    policy, _ = attachment.active()
    if policy is not None or current_head.get() is not None:
        call = named_arguments(type(top).forward, args, kwargs)
        keeps_prompt = policy is not None and policy.retained_prefix == "prompt"
        border = border_of(call, prompt_lengths, keeps_prompt, attachment.predicts_tokens)
    current_border.set((attachment.decoder, border))
    return args, kwargs if policy is None else rename_cache(kwargs, type(top).forward)


@uncompiled
def forget_border(top: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of the top model, called on errors too."""
    current_border.set(None)


def border_of(
    call: dict[str, Any], prompt_lengths: Any, keeps_prompt: bool, predicts_tokens: bool
) -> torch.Tensor | None:
    """The caller's column of each row's first thought, [B], or None if the call does not say.

    In host memory where the host knows it: a GPU need not be waited for then.

    In this order: `prompt_lengths`; the first label that is not -100 (a row without any takes the batch's minimum, and
    without any at all everything is prompt), also where labels are those of the last `logits_to_keep` columns (ms-swift
    cuts them so); an int `logits_to_keep` above 1 (TRL's way to ask for the logits of the completion and of the token
    before it); what a trainer has made known (`batch_known`).

    Args:
        predicts_tokens: labels are tokens; those of other heads (classes, scores) say nothing about the prompt.

    Raises:
        ValueError: `prompt_lengths` are not what they must be.
    """
    x = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
    if x is None:
        return None
    batch_size, length = x.shape[:2]
    past = cache_in(call)
    seen = past.get_seq_length() if past is not None else 0
    if prompt_lengths is not None:
        # With a cache the rest of the prompt may come later.
        most = None if past is not None or call.get("use_cache") else length
        return checked_lengths(prompt_lengths, batch_size, most)
    if seen:
        return None
    labels, logits_to_keep = call.get("labels"), call.get("logits_to_keep")
    kept = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep < length else length
    if (
        predicts_tokens
        and isinstance(labels, torch.Tensor)
        and not labels.is_floating_point()
        and labels.shape in ((batch_size, length), (batch_size, kept))
    ):
        labels = torch.nn.functional.pad(labels.to(x.device), (length - labels.shape[1], 0), value=-100)
        border = first_labels(labels)
        mask = call.get("attention_mask")
        if keeps_prompt and (mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2)):
            warn_of_labels(labels, border, mask)
        return border
    if isinstance(logits_to_keep, int) and logits_to_keep > 1:
        return torch.full((batch_size,), max(0, length - (logits_to_keep - 1)))
    return border_of_batch(x)


def warn_of_labels(labels: torch.Tensor, border: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Say what labels mean that may be meant otherwise. `labels` [B, T], `border` [B]."""
    length = labels.shape[1]
    if bool((border == length).all()):  # nothing is learned of this batch
        return
    if mask is None:
        num_prompt = border
    else:
        before = torch.nn.functional.pad(mask[:, :length].to(labels.device).cumsum(-1), (1, 0))
        num_prompt = before.gather(1, border[:, None])
    if not bool(num_prompt.any()):
        warn_caller(
            "The labels cover whole sequences, so PTE keeps no prompt: everything streams through the window. "
            "Set the labels of the prompt to -100, or pass `prompt_lengths`."
        )
    warn_of_turns(labels, border, mask)


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
