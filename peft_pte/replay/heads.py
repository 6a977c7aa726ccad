"""What is asked of a forward instead of logits, token by token, without ever holding logits of a whole sequence.

Here: log-probabilities and entropy of the policy. Divergences from the base model: distillation.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import peft_pte_kernels

from ..host import DecoderOutput
from .chunks import Results, span_of, token_results


class Head(Protocol):
    """`token_results` of one function of chunks."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor,
        needed: torch.Tensor,
        span: tuple[int, int] | None = None,
        least_chunks: int = 0,
    ) -> Results: ...


class Task(NamedTuple):
    """A head, what it compares with [B, T, ...] and where it is to give a result [B, T], in the caller's columns.

    Both stand at the token before the one whose result it is.
    """

    head: Head
    targets: torch.Tensor
    needed: torch.Tensor


# (tokens [B, T], validity [B, T], border [B] or None) -> what one model is asked for.
TaskOf = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], Task]


class Request(Protocol):
    """What a forward is asked for instead of logits; noted in `current_head` while the model runs."""

    @property
    def bounds_base(self) -> bool:
        """Whether it is asked of the base model under the adapter's window, where the adapter is off."""

    def task(self, top: nn.Module, ids: torch.Tensor, valid: torch.Tensor, border: torch.Tensor | None) -> Task:
        """As `TaskOf`, of the model `top`."""


@dataclass(frozen=True)
class LogProbHead:
    """Log-probabilities of all thoughts, and entropies."""

    temperature: float
    bounds_base: ClassVar[bool] = False

    def task(self, top: nn.Module, ids: torch.Tensor, valid: torch.Tensor, border: torch.Tensor | None) -> Task:
        function = functools.partial(chunk_logprobs, top, self.temperature)
        targets = ids.gather(1, next_tokens(valid).clamp(max=ids.shape[1] - 1))
        head = functools.partial(token_results, function, head_is_frozen(top))
        return Task(head, targets, needed_columns(valid, border))


current_head: ContextVar[Request | None] = ContextVar("pte_head", default=None)
# Hidden states that the decoder hands back at once, so that the model's own code makes the logits of a chunk.
current_hidden: ContextVar[torch.Tensor | None] = ContextVar("pte_hidden", default=None)
# Whether the base model is asked for its last hidden states themselves.
wants_hidden: ContextVar[bool] = ContextVar("pte_wants_hidden", default=False)


def packed(hidden_states: torch.Tensor) -> torch.Tensor:
    """Some columns of a sequence without its strides: to a layer without gradients, `torch.matmul` makes of those one
    product a row, for which the CPU's bfloat16 kernel copies the weight once a row."""
    return hidden_states.contiguous()


def logits_of(top: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """The logits [B, q, vocab] that the language model makes of decoder outputs [B, q, D].

    Through the model's own forward, since families scale, cap or cast their logits in their own ways.
    """
    token = current_hidden.set(packed(hidden_states))
    try:
        ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
        return type(top).forward(top, input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        current_hidden.reset(token)


def chunk_logprobs(
    top: nn.Module, temperature: float, hidden_states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` [B, q] after `hidden_states` [B, q, D], and entropy, both [B, q] in float32."""
    logits = logits_of(top, hidden_states)
    return peft_pte_kernels.token_logprobs(logits, targets.to(logits.device), temperature)


def head_is_frozen(top: nn.Module) -> bool:
    """Whether nothing is trained that makes logits of hidden states: then their gradients go to hidden states alone."""
    head, decoder = top.get_output_embeddings(), set(attachment_in(top).decoder.parameters())
    behind = [*(() if head is None else head.parameters()), *(x for x in top.parameters() if x not in decoder)]
    return not any(parameter.requires_grad for parameter in behind)


# The same for one segment, whose targets are known.
SegmentHead = Callable[[torch.Tensor], Results]


@dataclass
class Scoring:
    """What the head is asked for, in the layout's columns."""

    head: Head
    targets: torch.Tensor  # [B, T', ...]
    needed: torch.Tensor  # [B, T'], where it is to give a result
    needed_by_any: list[bool]  # [T'], the columns in which it is for any row; on the host, so that no segment waits

    def of_segment(self, start: int, end: int) -> SegmentHead:
        span = span_of(self.needed_by_any[start:end])
        return functools.partial(self.head, **self.about(start, end), span=span)

    def about(self, start: int, end: int) -> dict[str, torch.Tensor]:
        """`targets` and `needed` of a segment."""
        return dict(targets=self.targets[:, start:end], needed=self.needed[:, start:end])

    def of_nothing(self) -> SegmentHead:
        """For a segment of one token in one row whose results are not needed."""
        needed = torch.zeros_like(self.needed[:1, :1])
        return functools.partial(self.head, targets=self.targets[:1, :1], needed=needed)


def first_labels(labels: torch.Tensor) -> torch.Tensor:
    """The column [B] of each row's first label that is not -100; a row without any takes the batch's minimum.

    T for all rows if there are no labels at all. `labels` [B, T].
    """
    length = labels.shape[1]
    first = torch.where(labels != -100, torch.arange(length, device=labels.device), length).amin(-1)
    return torch.where(first == length, first.min(), first)


def needed_columns(valid: torch.Tensor, border: torch.Tensor | None) -> torch.Tensor:
    """The tokens [B, T] (bool) whose next token is a thought that is asked for. `valid` [B, T], `border` [B]."""
    following = next_tokens(valid)
    needed = valid & (following < valid.shape[1])
    return needed if border is None else needed & (following >= border.to(valid.device)[:, None])


def next_tokens(valid: torch.Tensor) -> torch.Tensor:
    """The column [B, T] of the first token after each column, T if there is none. Padding may be in between."""
    length = valid.shape[1]
    tokens = torch.where(valid, torch.arange(length, device=valid.device), length)
    return torch.nn.functional.pad(tokens.flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=length)


def at_tokens(result: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Results [B, T] move from the token before theirs to their own; zero where there is none.

    `valid` [B, T], None: all are tokens, so that nothing has to be kept for the backward pass.
    """
    if valid is None:
        return torch.nn.functional.pad(result[:, :-1], (1, 0))
    tokens = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1)
    before = torch.nn.functional.pad(tokens.cummax(1).values[:, :-1], (1, 0), value=-1)
    return result.gather(1, before.clamp(min=0)).masked_fill(~valid | (before < 0), 0)


def as_output(hidden_states: torch.Tensor, results: Results, valid: torch.Tensor | None) -> BaseModelOutputWithPast:
    """A decoder output that carries the results through the top model, whose own head then sees one column only.

    Through the output and not beside it, so that FSDP and DDP see what the loss depends on. Results stand at their own
    tokens here. `valid` [B, T]: where there is a token, None: everywhere.
    """
    first, second = (at_tokens(result, valid) for result in results)
    return DecoderOutput(last_hidden_state=packed(hidden_states[:, :1]), hidden_states=(first, second))


def as_hidden(hidden_states: torch.Tensor) -> BaseModelOutputWithPast:
    """A decoder output that carries all hidden states [B, T, D] through the top model, whose head sees one column."""
    return DecoderOutput(last_hidden_state=packed(hidden_states[:, :1]), hidden_states=(hidden_states,))


def sequence_logprobs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    prompt_lengths: Any = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of completions under the model's policy (Eq. 1), differentiable.

    With the adapter on this is the cache-constrained policy of decoding; with it off (`with model.disable_adapter():`)
    the base model with its full cache, which is the reference policy of Eq. 2. No tensor of logits over the whole
    sequence exists, forward or backward; switch gradient checkpointing on to keep activations of one segment only.

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP) or not.
        input_ids: [B, T], prompts and completions, in any layout.
        attention_mask: [B, T], 1 for tokens; None: all are tokens.
        prompt_lengths: [B] or int, the column of each row at which its completion begins (padding counted). None:
            whole rows are completions, which needs an integer `retained_prefix` or rows that fit into the window.
        temperature: logits are divided by it.

    Returns:
        `(logprobs, entropy)`, both [B, T] in the caller's layout, float32 (float64 in float64 models): entry t is for
        token t given those before it, 0 on prompt and padding. The entropy carries no gradient.

    Raises:
        ValueError: the temperature is not positive, the model has no PTE adapter, or as the model's forward.
    """
    check_model(model, temperature)
    return asked(model, LogProbHead(float(temperature)), input_ids, attention_mask, prompt_lengths)


def check_model(model: nn.Module, temperature: float) -> None:
    """Refuse what no head can work with."""
    if not temperature > 0:
        raise ValueError(f"`temperature` is {temperature}, but must be a positive number.")
    attachment_in(model)


def attachment_in(model: nn.Module) -> Any:
    """The `pte_attachment` of a model with a PTE adapter, wherever that stands in wrappers.

    Raises:
        ValueError: it has none.
    """
    for module in model.modules():
        if hasattr(module, "pte_attachment"):
            return module.pte_attachment
    raise ValueError(f"`model` ({type(model).__name__}) has no PTE adapter: make one with `get_peft_model`.")


def asked(
    model: nn.Module,
    request: Request,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    prompt_lengths: Any,
) -> Results:
    """What a forward of the whole model gives that is asked for something else than logits, [B, T] each."""
    token = current_head.set(request)
    try:
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            prompt_lengths=prompt_lengths,
            use_cache=False,
            return_dict=True,
        )
    finally:
        current_head.reset(token)
    return output.hidden_states


def sequence_loss(
    model: nn.Module,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The cross-entropy that `model(input_ids, attention_mask, labels=labels).loss` is, without logits of a sequence.

    For a `Trainer` with long sequences: override `compute_loss` with it (see docs/training.md).

    Args:
        model: a model with a PTE adapter, wrapped (PEFT, DDP) or not.
        input_ids: [B, T]. attention_mask: [B, T], 1 for tokens; None: all are tokens.
        labels: [B, T], the token itself where it counts, else -100; they are shifted here. The first one that is not
            -100 is the border between prompt and thoughts.
        num_items_in_batch: the sum is divided by it, as `Trainer` wants it under gradient accumulation. None: the mean
            over the labels of this call.

    Returns:
        The loss, a scalar in float32 (float64 in float64 models).

    Raises:
        ValueError: shapes differ, labels are other tokens than `input_ids`, or as `sequence_logprobs`.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"`labels` {tuple(labels.shape)} and `input_ids` {tuple(input_ids.shape)} differ in shape.")
    wanted = labels != -100
    if bool((labels != input_ids)[wanted].any()):
        raise ValueError(
            "`labels` hold other tokens than `input_ids` (both unshifted). A loss on other tokens needs the logits: "
            "use `model(..., labels=labels).loss`."
        )
    logprobs, _ = sequence_logprobs(model, input_ids, attention_mask, first_labels(labels))
    return divided(-(logprobs * wanted).sum(), wanted[:, 1:], num_items_in_batch)


def divided(total: torch.Tensor, counted: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """A sum over tokens by their number: of those `counted` (bool) here, unless the `Trainer` says another."""
    # Without any, as in a micro-batch whose completions were cut off, the loss is zero, and not 0 / 0.
    count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
