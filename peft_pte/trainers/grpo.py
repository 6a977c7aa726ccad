"""TRL on long rollouts: `GRPOTrainer` with log-probabilities that never hold the logits of a sequence.

TRL's own trainers work with PTE as they are; see docs/training.md. Needs `pip install peft-pte[trl]`.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer

from ..config import PTEConfig
from ..hooks.generation import REFUSED_GENERATION, SampledLogProbs, current_recorder
from ..replay.heads import sequence_logprobs
from ..static import pte_adapter
from .checkpoints import AtomicCheckpoints


class PTEGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """`trl.GRPOTrainer`, with the same arguments, for a model with a PTE adapter.

    - Log-probabilities and entropies come from `sequence_logprobs`; with `PTEConfig(gradient="truncated")` memory on
      the device does not grow with the rollout.
    - The reference policy (`beta` > 0) is always the base model with its full cache (Eq. 2). TRL itself takes the
      initial adapter when it is given a model that has one already.
    - Importance ratios of training to sampling are logged as `importance_ratio/{min,mean,max}`: decoding notes the
      log-probability of every token it draws, at the temperature and before top-k, top-p and min-p cut the
      distribution. Before the first optimizer step on a rollout they are 1, unless penalties and other logits
      processors change what is drawn from; a warning then says so.
    - With `use_vllm=True` rollouts run under vLLM, with the adapter in the engine (docs/vllm.md); the same is logged.
    - Checkpoints are complete or not there, whenever the run is killed (`AtomicCheckpoints`).

    Raises:
        ValueError: continuous batching (paged caches), tools, environments, a rollout function, beams or an entropy
            bonus are asked for; or, with `use_vllm=True`, something that PTE has not under vLLM.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        call = signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        refuse_arguments(call)
        model, config = call.get("model"), call.get("peft_config")
        has_adapter = isinstance(model, nn.Module) and any(hasattr(m, "pte_attachment") for m in model.modules())
        if not isinstance(config, PTEConfig) and not has_adapter:
            raise ValueError("The model has no PTE adapter: pass `peft_config=PTEConfig(...)` or a model with one.")
        rollouts: AbstractContextManager[None] = nullcontext()
        if getattr(call.get("args"), "use_vllm", False):
            from .rollouts import refuse_vllm, vllm_generation  # of all that is here, most bound to a version of TRL

            refuse_vllm(call["args"], pte_adapter(model, None)[1] if has_adapter else call["peft_config"])
            rollouts = vllm_generation()
        warn_of_processors(call.get("args"))
        self._sampling: tuple[torch.Tensor, torch.Tensor] | None = None
        with rollouts:
            super().__init__(*args, **kwargs)
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], list[list[float]]]:
        """Rollouts, with the log-probabilities that they were drawn with."""
        if self.use_vllm:
            return super()._generate_single_turn(*args, **kwargs)
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
            self._log_importance_ratios(logprobs.detach(), *self._sampling)
        return logprobs, entropies if compute_entropy else None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if "sampling_per_token_logps" in inputs:
            self._sampling = inputs["sampling_per_token_logps"], inputs["completion_mask"].bool()
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._sampling = None

    def _log_importance_ratios(self, logprobs: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> None:
        ratios = (logprobs - sampled).exp()
        sums = torch.stack([ratios.masked_fill(~mask, 0).sum(), mask.sum().to(ratios.dtype)])
        total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["importance_ratio/mean"].append(total / max(count, 1))
        kept = ratios.masked_fill(~mask, 1)
        metrics["importance_ratio/min"].append(self.accelerator.gather(kept.amin()).min().item())
        metrics["importance_ratio/max"].append(self.accelerator.gather(kept.amax()).max().item())


def refuse_arguments(call: dict[str, Any]) -> None:
    """Settings that PTE cannot honour, before anything is built. `call`: the trainer's arguments by name."""
    args: GRPOConfig | None = call.get("args")
    if getattr(args, "use_transformers_continuous_batching", False):
        raise ValueError(
            "`use_transformers_continuous_batching=True` is not supported with PTE: its paged cache holds no thought "
            "states. Leave it out: rollouts run with `generate`."
        )
    for name in ("tools", "environment_factory", "rollout_func"):
        if call.get(name):
            raise ValueError(
                f"`{name}` is not supported with PTE: a loop of several turns prefills everything up to a tool's or an "
                "environment's answer as a new prompt, so sampling and training would be different policies."
            )
    options = getattr(args, "generation_kwargs", None) or {}
    if (options.get("num_beams") or 1) > 1:
        raise ValueError(
            f"`num_beams={options['num_beams']}` in `generation_kwargs` is not supported: beams are searched for and "
            "not drawn, so there is no policy that they could be a sample of. Leave it out."
        )
    for name, reason in REFUSED_GENERATION.items():
        if options.get(name) is not None:
            raise ValueError(f"`{name}` in `generation_kwargs` is not supported with PTE: {reason}. Leave it out.")
    if getattr(args, "entropy_coef", 0) or getattr(args, "use_adaptive_entropy", False):
        raise ValueError(
            "An entropy bonus (`entropy_coef`, `use_adaptive_entropy`) needs the gradient of the entropy, which the "
            "memory-flat head does not give: use `trl.GRPOTrainer`."
        )


# What `generation_kwargs` may hold without changing the distribution of the next token before it is cut (top-k, top-p).
UNCHANGING = {
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "do_sample", "num_beams", "num_return_sequences"),
    *("max_new_tokens", "max_length", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("use_cache", "return_dict_in_generate", "output_scores", "output_logits", "disable_compile", "max_time"),
    # of vLLM
    *("stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "detokenize"),
}


def warn_of_processors(args: GRPOConfig | None) -> None:
    """Say that rollouts are drawn from another distribution than the policy that is trained."""
    options = {name: value for name, value in (getattr(args, "generation_kwargs", None) or {}).items() if value}
    penalty = getattr(args, "repetition_penalty", 1.0)
    if penalty not in (None, 1.0):
        options["repetition_penalty"] = penalty
    if args is not None and args.use_vllm and args.vllm_structured_outputs_regex is not None:
        options["vllm_structured_outputs_regex"] = args.vllm_structured_outputs_regex
    changing = [f"{name}={value!r}" for name, value in options.items() if name not in UNCHANGING]
    if changing:
        warnings.warn(
            f"With {', '.join(changing)}, rollouts are drawn from another distribution than the policy whose "
            "log-probabilities are trained. `importance_ratio` compares the policy with what was drawn from (before "
            "top-k and top-p cut it), so it is not 1 even before the first step.",
            stacklevel=3,
        )
