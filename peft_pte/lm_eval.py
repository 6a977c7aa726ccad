"""lm-evaluation-harness under the bounded cache: `python -m peft_pte -m lm_eval --model pte-hf --model_args ...`.

The harness's own `hf` model scores a continuation by one forward of the whole text, which says nothing of where the
context ends. Here the context is the prompt and the continuation the thoughts, as in `generate`.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from tqdm import tqdm

logger = logging.getLogger(__name__)
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


@register_model("pte-hf")
class PTEHFLM(HFLM):
    """The harness's `hf` model (same `--model_args`) whose log-likelihoods are those of the cache-constrained policy.

    Generation is `generate`'s, as in `hf`. With `loglikelihood_rolling` the context is the prefix token alone (or the
    last token of the window before), and all that follows streams through the window. Only for adapters that are given
    as `peft=...`, and for ordinary models, whose results are those of `hf`.
    """

    def _model_call(self, inps: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Logits of texts without a known context, with which the harness looks for a batch size: all is thoughts."""
        return self._logits(inps, torch.ones_like(inps), [1] * len(inps))

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, prompt_lengths: list[int]) -> torch.Tensor:
        dtype = self.mixed_precision_dtype
        border = {"prompt_lengths": prompt_lengths} if hasattr(self._pte_top(), "pte_attachment") else {}
        with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False, **border).logits

    def _pte_top(self) -> torch.nn.Module:
        """The transformers model inside, which has the hooks."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Sum of the continuation's log-probabilities, and whether it is the greedy one, for each request."""
        if self.backend != "causal":
            raise ValueError(f"`backend={self.backend!r}` is not supported with PTE: it is for decoder-only models.")
        ordered = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        automatic = self.batch_size == "auto" and not override_bs
        self.batch_sizes: dict[int, int] = {}  # of the automatic search, which is of these requests
        size = override_bs or (0 if automatic else int(self.batch_size))
        batches = ordered.get_batched(n=size, batch_fn=self._batch_scheduler if automatic and requests else None)
        results = []
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods (PTE)")
        for batch in batches:
            results += self._score(batch)
            for (texts, _, _), result in zip(batch, results[-len(batch) :]):
                if texts is not None:  # the parts of a rolling request have none
                    self.cache_hook.add_partial("loglikelihood", texts, result)
            progress.update(len(batch))
        progress.close()
        return ordered.get_original(results)

    def _score(self, batch: list[Request]) -> list[tuple[float, bool]]:
        # As in `hf`: a text that is too long loses its beginning, and the last token is predicted and not read.
        for _, context, continuation in batch:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"A request has a context of {len(context)} tokens and a continuation of {len(continuation)}: both "
                    f"must have some, and the continuation `max_length` ({self.max_length}) at most."
                )
            if len(context + continuation) > self.max_length + 1:
                logger.warning(
                    f"A context of {len(context)} tokens loses its beginning: with its continuation of "
                    f"{len(continuation)} it is longer than `max_length` ({self.max_length})."
                )
        texts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in batch]
        longest = max(map(len, texts)) - 1
        ids = torch.zeros(len(batch), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text) - 1] = torch.tensor(text[:-1])
            mask[row, : len(text) - 1] = 1
        borders = [len(text) - len(continuation) for text, (_, _, continuation) in zip(texts, batch)]
        results = []
        for text, border, logits in zip(texts, borders, self._logits(ids, mask, borders)):
            targets = torch.tensor(text[border:], device=logits.device)
            logprobs = F.log_softmax(logits[border - 1 : len(text) - 1].to(self.softmax_dtype or torch.float32), dim=-1)
            greedy = bool((logprobs.argmax(-1) == targets).all())
            results.append((float(logprobs.gather(-1, targets[:, None]).sum()), greedy))
        return results
