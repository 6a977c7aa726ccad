"""Self-distillation: the base model with its full cache teaches the same model under the bounded one.

Both distributions of a token are made of hidden states, the teacher's and the student's, in chunks that the backward
pass computes again (heads.py): no logits of a whole sequence exist on either side, and what is kept of the teacher is
one hidden state a token.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.autograd.function import once_differentiable

from ..config import CachePolicy
from . import segments
from .chunks import Results, token_results
from .heads import (
    Task,
    asked,
    at_tokens,
    attachment_in,
    check_model,
    divided,
    head_is_frozen,
    logits_of,
    needed_columns,
    wants_hidden,
)
from .layout import Layout, checked_lengths, gathered

Divergence = Literal["forward", "reverse", "mixed"]


def scaled_logits(top: nn.Module, hidden_states: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits [B, q, vocab] after `hidden_states` [B, q, D] by the temperature, in float32 or float64."""
    logits = logits_of(top, hidden_states)
    logits = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return logits if temperature == 1 else logits / temperature


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [...] of log-probabilities [..., vocab]. Tokens that are impossible under p (-inf) add nothing."""
    return (p.exp() * torch.where(p > float("-inf"), p - q, 0)).sum(-1)


class ForwardKL(torch.autograd.Function):
    """`kl_divergence(expected, logits.log_softmax(-1))`, whose gradient by logits [..., vocab] is q - p.

    The same numbers as autograd's, with half of its passes over tensors that are as wide as the vocabulary.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        actual, p = logits.log_softmax(-1), expected.exp()
        difference = (expected - actual).masked_fill_(expected == float("-inf"), 0)
        value = difference.mul_(p).sum(-1)
        ctx.save_for_backward(actual.exp_().sub_(p))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference * gradients[..., None], None


def chunk_divergence(
    top: nn.Module, divergence: Divergence, temperature: float, hidden_states: torch.Tensor, teacher: torch.Tensor
) -> Results:
    """The divergence of student and teacher hidden states [B, q, D], and KL(teacher || student), both [B, q]."""
    with torch.no_grad():
        expected = scaled_logits(top, teacher.to(hidden_states.dtype), temperature).log_softmax(-1)
    logits = scaled_logits(top, hidden_states, temperature)
    if divergence == "forward":
        forward = ForwardKL.apply(logits, expected)
        return forward, forward.detach()
    actual = logits.log_softmax(-1)
    reverse = kl_divergence(actual, expected)
    if divergence == "mixed":
        forward = kl_divergence(expected, actual)
        return (forward + reverse) / 2, forward.detach()
    return reverse, kl_divergence(expected, actual.detach())


@dataclass(frozen=True)
class DivergenceHead:
    """Divergences from `teacher` [B, T, D] where they are `needed` [B, T], in the caller's columns."""

    divergence: Divergence
    temperature: float
    teacher: torch.Tensor
    needed: torch.Tensor
    bounds_base: ClassVar[bool] = True

    def task(self, top: nn.Module, ids: torch.Tensor, valid: torch.Tensor, border: torch.Tensor | None) -> Task:
        function = functools.partial(chunk_divergence, top, self.divergence, self.temperature)
        return Task(functools.partial(token_results, function, head_is_frozen(top)), self.teacher, self.needed)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """All adapters of PEFT off, wherever `model` stands in wrappers; afterwards everything is as it was.

    It is PEFT's own switch, and stands on the modules: no other thread may use the model meanwhile.
    """
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    layers = [m for m in model.modules() if isinstance(m, kinds) and not m._disable_adapters]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, is_trained in trained:  # PEFT trains what it switches on
            parameter.requires_grad_(is_trained)


def waits_on_host(model: nn.Module) -> bool:
    """Whether what grows with the sequence is kept in host memory."""
    policy = policy_of(model)
    return policy.offload or policy.gradient == "truncated"


def base_in_front(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The last hidden states [B, T, D] of `teacher_states`, and in which order tokens were (None: as they are).

    One forward of the decoder with the adapter off, without a cache and without a mask: tokens move to the front of
    their rows, where no token sees the padding behind it, and a mask of [T, T] would be larger than all else.
    """
    order = None
    if attention_mask is not None and not bool(attention_mask.all()):
        valid = attention_mask.to(input_ids.device).bool()
        order = (~valid).long().argsort(dim=1, stable=True)
        input_ids = input_ids.gather(1, order)
    token = wants_hidden.set(True)
    try:
        with torch.no_grad(), adapter_off(model):
            output = model(input_ids=input_ids, use_cache=False, return_dict=True)
    finally:
        wants_hidden.reset(token)
    return output.hidden_states[0], order


def teacher_states(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The last hidden states of the base model with its full cache, [B, T, D] in its dtype, without gradients.

    Arguments as `sequence_divergence`; on padding the result means nothing.
    """
    hidden_states, order = base_in_front(model, input_ids, attention_mask)
    return hidden_states if order is None else gathered(hidden_states, order.argsort(dim=1))


def refuse_trained_head(top: nn.Module) -> None:
    """The teacher's logits are made by the head as it is in the student's forward."""
    head = top.get_output_embeddings()
    if head is None:
        raise ValueError(f"`model` ({type(top).__name__}) has no language-model head to compare distributions of.")
    wrapped = isinstance(head, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    if wrapped or any(parameter.requires_grad for parameter in head.parameters()):
        raise ValueError(
            "`model` trains its output head (or embeddings that are tied to it), which the teacher uses too: it would "
            "change with the student. Leave it out of `modules_to_save` and `trainable_token_indices`, and freeze it."
        )


def policy_of(model: nn.Module) -> CachePolicy:
    """The policy that calls of the model run under in this context; of its adapters that are off, if all are."""
    attachment = attachment_in(model)
    policy = attachment.active()[0] or attachment.resting_policy()
    if policy is None:
        raise ValueError("`model` has no active PTE adapter: choose one with `set_adapter`.")
    return policy


def compared_columns(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_lengths: Any = None,
    only_after_eviction: bool = True,
) -> torch.Tensor:
    """The tokens [B, T] (bool) whose next token `sequence_divergence` compares; arguments as there."""
    policy, (batch_size, length) = policy_of(model), input_ids.shape
    valid = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.to(input_ids.device).bool()
    if prompt_lengths is not None:
        prompt_lengths = checked_lengths(prompt_lengths, batch_size, length).to(input_ids.device)
    elif policy.retained_prefix == "prompt":
        raise ValueError(
            "`prompt_lengths` is None, but with `retained_prefix='prompt'` the prompt stays in the cache. Pass the "
            "column of each row at which its completion begins ([batch], padding counted; 0: there is no prompt)."
        )
    needed = needed_columns(valid, prompt_lengths)
    if only_after_eviction:
        needed = needed & Layout.create(valid, prompt_lengths, policy).after_eviction()
    return needed


class Divergences(NamedTuple):
    """Of each token given those before it, all [B, T] in the caller's layout, zero (False) on what is not counted.

    `values`: the divergence, with a gradient; `kl`: KL(teacher || student), without; `counted`: where they are asked
    for.
    """

    values: torch.Tensor
    kl: torch.Tensor
    counted: torch.Tensor


def sequence_divergence(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_lengths: Any = None,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    only_after_eviction: bool = True,
    teacher: torch.Tensor | None = None,
) -> Divergences:
    """How far the bounded policy (Eq. 1) is from the base model with its full cache, token by token.

    With p_T the base model's distribution of the next token, adapter off and full cache, and p_S that of the policy:

    - `"forward"`: KL(p_T || p_S) = sum_v p_T(v) (log p_T(v) - log p_S(v)), as in distillation since Hinton et al. 2015
      (arXiv 1503.02531), here of each token (Kim and Rush 2016, arXiv 1606.07947). The student covers all that the
      teacher does.
    - `"reverse"`: KL(p_S || p_T). The student may leave out what the teacher does (MiniLLM, arXiv 2306.08543).
    - `"mixed"`: half the sum of both (Jeffreys' divergence, halved).

    The gradient goes through p_S only. No tensor of logits over the whole sequence exists on either side; of the
    teacher one hidden state a token is kept, which waits in host memory with `gradient="truncated"` or `offload=True`.

    With the adapter off (`with model.disable_adapter():`) the student is the base model under the adapter's window:
    what there is to be gained. `peft_pte.window` changes the window.

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP, FSDP2) or not. No other thread may use it meanwhile.
        input_ids: [B, T], prompts and completions, in any layout.
        attention_mask: [B, T], 1 for tokens; None: all are tokens.
        prompt_lengths: [B] or int, the column of each row at which its completion begins (padding counted). None: whole
            rows are completions, which needs an integer `retained_prefix`.
        divergence: which one. temperature: the logits of both are divided by it; the result is not scaled back.
        only_after_eviction: compare only tokens that are predicted when thoughts have left; before that, student and
            teacher see the same tokens. False: all tokens that are not prompt.
        teacher: `teacher_states(model, input_ids, attention_mask)`, if that has been computed.

    Returns:
        `Divergences`, in float32 (float64 in float64 models).

    Raises:
        ValueError: the divergence is unknown, the temperature not positive, the model has no PTE adapter or trains its
            output head, `teacher` has another shape, the prompts are not known, or as the model's forward.
    """
    check_model(model, temperature)
    if divergence not in get_args(Divergence):
        raise ValueError(
            f"`divergence` is {divergence!r}, but must be one of {', '.join(map(repr, get_args(Divergence)))}."
        )
    refuse_trained_head(attachment_in(model).top)
    needed = compared_columns(model, input_ids, attention_mask, prompt_lengths, only_after_eviction)
    if teacher is None:
        teacher = teacher_states(model, input_ids, attention_mask)
    elif teacher.ndim != 3 or teacher.shape[:2] != input_ids.shape:
        raise ValueError(
            f"`teacher` has shape {tuple(teacher.shape)}, but must be [batch, tokens, hidden size] for `input_ids` of "
            f"{tuple(input_ids.shape)}: what `teacher_states` gives for the same batch."
        )
    if torch.is_grad_enabled() and waits_on_host(model):
        teacher = segments.host_copy(teacher)
    request = DivergenceHead(divergence, float(temperature), teacher, needed)
    del teacher
    values, kl = asked(model, request, input_ids, attention_mask, prompt_lengths)
    valid = torch.ones_like(needed) if attention_mask is None else attention_mask.to(needed.device).bool()
    return Divergences(values, kl, at_tokens(needed, valid))


def distillation_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_lengths: Any = None,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    only_after_eviction: bool = True,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The mean divergence of the bounded policy from the base model with its full cache: `sequence_divergence`.

    It needs neither labels nor rewards. Behind it stands an ordinary `loss.backward()`, also with gradient
    checkpointing, `offload=True` and `gradient="truncated"`, under DDP and FSDP2.

    Args:
        model: a model with a PTE adapter, wrapped or not. This and what follows: as of `sequence_divergence`.
        input_ids: [B, T].
        attention_mask: [B, T], 1 for tokens.
        prompt_lengths: [B] or int.
        divergence: `"forward"`, `"reverse"` or `"mixed"`.
        temperature: the logits of both are divided by it.
        only_after_eviction: compare only tokens that are predicted when thoughts have left.
        num_items_in_batch: the sum is divided by it, as `Trainer` wants it under gradient accumulation. None: the mean
            over the tokens that are compared in this call.

    Returns:
        The loss, a scalar in float32 (float64 in float64 models); zero, with zero gradients, where nothing is compared.

    Raises:
        ValueError: as `sequence_divergence`.
    """
    found = sequence_divergence(
        model, input_ids, attention_mask, prompt_lengths, divergence, temperature, only_after_eviction
    )
    return divided(found.values.sum(), found.counted, num_items_in_batch)
