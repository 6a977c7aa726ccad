"""TRL on long rollouts: `GRPOTrainer` with log-probabilities that never hold the logits of a sequence.

TRL's own trainers work with PTE as they are; see the README. Needs `pip install peft-pte[trl]`.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from ..config import PTEConfig
from ..hooks.generation import SampledLogProbs, current_recorder
from ..replay.heads import sequence_logprobs
from .checkpoints import AtomicCheckpoints


class PTEGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """`trl.GRPOTrainer`, with the same arguments, for a model with a PTE adapter.

    - Log-probabilities and entropies come from `sequence_logprobs`; with `PTEConfig(gradient="truncated")` memory on
      the device does not grow with the rollout.
    - The reference policy (`beta` > 0) is always the base model with its full cache (Eq. 2). TRL itself takes the
      initial adapter when it is given a model that has one already.
    - Importance ratios of training to sampling are logged as `importance_ratio/{min,mean,max}`: decoding notes the
      log-probability of every token it draws. Before the first optimizer step on a rollout they are 1.
    - Checkpoints are complete or not there, whenever the run is killed (`AtomicCheckpoints`).

    Raises:
        ValueError: vLLM, continuous batching (paged caches), tools or an entropy bonus are asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        call = signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        refuse_arguments(call.get("args"), call.get("tools"))
        model, config = call.get("model"), call.get("peft_config")
        has_adapter = isinstance(model, nn.Module) and any(hasattr(m, "pte_attachment") for m in model.modules())
        if not isinstance(config, PTEConfig) and not has_adapter:
            raise ValueError("The model has no PTE adapter: pass `peft_config=PTEConfig(...)` or a model with one.")
        self._sampling: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__(*args, **kwargs)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]]]:
        """Rollouts, with the log-probabilities that they were drawn with."""
        recorder = SampledLogProbs(self.temperature)
        token = current_recorder.set(recorder)
        try:
            completion_ids, *_ = super()._generate_single_turn(*args, **kwargs)
        finally:
            current_recorder.reset(token)
        return completion_ids, recorder.rows([len(ids) for ids in completion_ids])

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Both [B, logits_to_keep]."""
        given = [name for name, value in multimodal.items() if value is not None]
        if given or compute_aux_loss:
            raise ValueError(f"PTE has text-only decoders without router losses; got {given or 'compute_aux_loss'}.")
        border = input_ids.shape[1] - logits_to_keep
        parts = []
        for ids, mask in zip(*(x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask))):
            with self.accelerator.autocast():
                parts.append(sequence_logprobs(model, ids, mask, border, self.temperature))
        logprobs, entropies = (torch.cat(part)[:, border:] for part in zip(*parts))
        if self._sampling is not None:
            self._log_importance_ratios(logprobs.detach())
        return logprobs, entropies if compute_entropy else None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if "sampling_per_token_logps" in inputs:
            self._sampling = inputs["sampling_per_token_logps"], inputs["completion_mask"].bool()
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._sampling = None

    def _log_importance_ratios(self, logprobs: torch.Tensor) -> None:
        sampled, mask = self._sampling
        ratios = (logprobs - sampled).exp()
        sums = torch.stack([ratios.masked_fill(~mask, 0).sum(), mask.sum().to(ratios.dtype)])
        total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["importance_ratio/mean"].append(total / max(count, 1))
        kept = ratios.masked_fill(~mask, 1)
        metrics["importance_ratio/min"].append(self.accelerator.gather(kept.amin()).min().item())
        metrics["importance_ratio/max"].append(self.accelerator.gather(kept.amax()).max().item())


def refuse_arguments(args: GRPOConfig | None, tools: Any) -> None:
    """Settings that PTE cannot honour, before anything is built."""
    if getattr(args, "use_vllm", False):
        raise ValueError("`use_vllm=True` is not supported with PTE: vLLM's paged cache holds no thought states.")
    if getattr(args, "use_transformers_continuous_batching", False):
        raise ValueError(
            "`use_transformers_continuous_batching=True` is not supported with PTE: its paged cache holds no thought "
            "states. Leave it out: rollouts run with `generate`."
        )
    if tools:
        raise ValueError(
            "`tools` are not supported with PTE: TRL prefills everything up to a tool's answer as a new prompt, so "
            "sampling and training would be different policies."
        )
    if getattr(args, "entropy_coef", 0) or getattr(args, "use_adaptive_entropy", False):
        raise ValueError(
            "An entropy bonus (`entropy_coef`, `use_adaptive_entropy`) needs the gradient of the entropy, which the "
            "memory-flat head does not give: use `trl.GRPOTrainer`."
        )
