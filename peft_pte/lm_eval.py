"""lm-evaluation-harness under the bounded cache: `python -m peft_pte -m lm_eval --model hf --model_args ...,peft=...`.

The harness's `hf` model scores a continuation by one forward of the whole text, which says nothing of where the context
ends. Importing this module, as the runner does, makes all of the harness's models that are made of `hf` score a model
with a PTE adapter as the policy does: the context is the prompt and the continuation the thoughts, as in `generate`.
Other models are scored as ever. Generation is `generate`'s either way.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from tqdm import tqdm

logger = logging.getLogger(__name__)
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


def has_pte(harness: HFLM) -> bool:
    """Whether the model that is evaluated has a PTE adapter."""
    model = harness.model
    top = model.get_base_model() if hasattr(model, "get_base_model") else model
    return hasattr(top, "pte_attachment")


def policy_scores(
    harness: HFLM, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
) -> list[tuple[float, bool]]:
    """Sum of the continuation's log-probabilities, and whether it is the greedy one, for each request.

    With `loglikelihood_rolling` the context is the prefix token alone (or the last token of the window before), and all
    that follows streams through the window.

    Raises:
        ValueError: a request without context or continuation, or one of the harness's models that calls its model in a
            way of its own, which this one would leave out.
    """
    if harness.backend != "causal":
        raise ValueError(f"`backend={harness.backend!r}` is not supported with PTE: it is for decoder-only models.")
    refuse_other_calls(harness)
    ordered = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
    automatic = harness.batch_size == "auto" and not override_bs
    harness.batch_sizes = {}  # of the automatic search, which is of these requests
    size = override_bs or (0 if automatic else int(harness.batch_size))
    batches = ordered.get_batched(n=size, batch_fn=harness._batch_scheduler if automatic and requests else None)
    results = []
    progress = tqdm(total=len(requests), disable=disable_tqdm or harness.rank != 0, desc="log-likelihoods (PTE)")
    for batch in batches:
        results += batch_scores(harness, batch)
        for (texts, _, _), result in zip(batch, results[-len(batch) :]):
            if texts is not None:  # the parts of a rolling request have none
                harness.cache_hook.add_partial("loglikelihood", texts, result)
        progress.update(len(batch))
    progress.close()
    return ordered.get_original(results)


def batch_scores(harness: HFLM, batch: list[Request]) -> list[tuple[float, bool]]:
    # As in `hf`: a text that is too long loses its beginning, and the last token is predicted and not read.
    longest = harness.max_length
    for _, context, continuation in batch:
        if not context or not 0 < len(continuation) <= longest:
            raise ValueError(
                f"A request has a context of {len(context)} tokens and a continuation of {len(continuation)}: both "
                f"must have some, and the continuation `max_length` ({longest}) at most."
            )
        if len(context + continuation) > longest + 1:
            logger.warning(
                f"A context of {len(context)} tokens loses its beginning: with its continuation of "
                f"{len(continuation)} it is longer than `max_length` ({longest})."
            )
    texts = [(context + continuation)[-(longest + 1) :] for _, context, continuation in batch]
    ids = torch.zeros(len(batch), max(map(len, texts)) - 1, dtype=torch.long, device=harness.device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text) - 1] = torch.tensor(text[:-1])
        mask[row, : len(text) - 1] = 1
    borders = [len(text) - len(continuation) for text, (_, _, continuation) in zip(texts, batch)]
    dtype = harness.softmax_dtype or torch.float32
    results = []
    for text, border, logits in zip(texts, borders, policy_logits(harness, ids, mask, borders)):
        targets = torch.tensor(text[border:], device=logits.device)
        logprobs = F.log_softmax(logits[border - 1 : len(text) - 1].to(dtype), dim=-1)
        greedy = bool((logprobs.argmax(-1) == targets).all())
        results.append((float(logprobs.gather(-1, targets[:, None]).sum()), greedy))
    return results


def policy_logits(harness: HFLM, ids: torch.Tensor, mask: torch.Tensor, prompt_lengths: list[int]) -> torch.Tensor:
    """Logits [B, T, vocab] of `ids` [B, T], whose rows begin in column 0."""
    dtype = harness.mixed_precision_dtype
    with torch.no_grad(), torch.autocast(harness.device.type, dtype=dtype, enabled=dtype is not None):
        return harness.model(input_ids=ids, attention_mask=mask, use_cache=False, prompt_lengths=prompt_lengths).logits


def refuse_other_calls(harness: HFLM) -> None:
    if type(harness)._model_call is not HFLM._model_call:
        raise ValueError(
            f"The harness's model {type(harness).__name__} calls its model in a way of its own, which does not say "
            "where the context ends. With a PTE adapter use `--model hf`."
        )


# Harnesses that look for a batch size, with texts that have no context.
searching: set[int] = set()


def install() -> None:
    """Put the scores of PTE into the harness's `hf` and what inherits from it."""
    scores, call, search = HFLM._loglikelihood_tokens, HFLM._model_call, HFLM._detect_batch_size

    @functools.wraps(scores)
    def scores_of_the_policy(self: HFLM, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return (policy_scores if has_pte(self) else scores)(self, *args, **kwargs)

    @functools.wraps(call)
    def call_with_border(self: HFLM, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not has_pte(self):
            return call(self, inps, *args, **kwargs)
        if id(self) not in searching:
            raise ValueError(
                "The harness called the model on whole texts, which does not say where the context ends; with a PTE "
                "adapter that would be the full cache. Use tasks of log-likelihoods or of `generate_until`."
            )
        return policy_logits(self, inps, torch.ones_like(inps), [1] * len(inps))

    @functools.wraps(search)
    def search_among_thoughts(self: HFLM, *args: Any, **kwargs: Any) -> int:
        searching.add(id(self))
        try:
            return search(self, *args, **kwargs)
        finally:
            searching.discard(id(self))

    HFLM._loglikelihood_tokens = scores_of_the_policy
    HFLM._model_call = call_with_border
    HFLM._detect_batch_size = search_among_thoughts


install()


@register_model("pte-hf")
class PTEHFLM(HFLM):
    """`hf` under a name that only the runner knows."""
