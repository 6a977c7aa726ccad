"""Progressive Thought Encoding as a tuner type of ms-swift 4.6.

    PTE_CONFIG='{"window_size": 1024}' swift sft --external_plugins examples/plugins/ms_swift_pte.py --tuner_type pte \\
        --model Qwen/Qwen2.5-3B-Instruct --dataset chats.jsonl --lora_rank 32 --lora_alpha 16
    swift infer --adapters output/.../checkpoint-100 --stream true

Rank, scaling, dropout, target modules and `modules_to_save` are swift's own LoRA options where they are given; the
environment variable `PTE_CONFIG` holds any field of `PTEConfig` as JSON, and has the last word. What neither names has
`PTEConfig`'s default, not swift's: a LoRA of rank 8 with alpha 32 is four times the scaling that PTE wants at most.
Checkpoints are ordinary PEFT adapters.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from swift.template import Template
from swift.tuner_plugin import PeftTuner, tuners_map
from swift.utils import get_logger

from peft_pte import PTEConfig

FIELDS = dict(
    lora_rank="r",
    lora_alpha="pte_alpha",
    lora_dropout="pte_dropout",
    target_modules="target_modules",
    target_regex="target_modules",
    modules_to_save="modules_to_save",
)
MEANINGLESS = (
    "lora_bias",
    "lora_dtype",
    "use_rslora",
    "use_dora",
    "lorap_lr_ratio",
    "target_parameters",
)
TRIED = (None, "dpo", "grpo")  # `rlhf_type`


class PTETuner(PeftTuner):
    """Makes the adapter; saving and loading are those of any PEFT adapter."""

    @staticmethod
    def prepare_model(args: Any, model: torch.nn.Module) -> PeftModel:
        """The model with a new adapter on it."""
        refuse(args)
        config = pte_config(args)
        get_logger().info(f"pte_config: {config}")
        return get_peft_model(model, config)


def pte_config(args: Any) -> PTEConfig:
    """The configuration that swift's arguments and `PTE_CONFIG` ask for."""
    given = given_options(args)
    options = {field: getattr(args, name) for name, field in FIELDS.items() if name in given}
    if options.get("target_modules") == ["all-linear"]:
        del options["target_modules"]  # swift's word for its default; PTE's is all projections of the attention
    options |= json.loads(os.environ.get("PTE_CONFIG") or "{}")
    return PTEConfig(task_type="CAUSAL_LM", **options)


def given_options(args: Any) -> set[str]:
    """Names of the options that somebody has set: on the command line (even to their default), or to another value."""
    named = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in sys.argv if word.startswith("--")}

    def default(field: Any) -> Any:
        return field.default if field.default_factory is MISSING else field.default_factory()

    changed = {field.name for field in fields(args) if getattr(args, field.name, None) != default(field)}
    return {field.name for field in fields(args)} & (named | changed)


def refuse(args: Any) -> None:
    """What would be ignored, or go wrong later with a message that helps less."""
    for name in sorted(given_options(args).intersection(MEANINGLESS)):
        raise ValueError(f"--{name} has no meaning for PTE: leave it out.")
    for name, reason in (
        ("packing", "there is one thought state per row"),
        ("padding_free", "there is one thought state per row"),
        ("use_vllm", "the update depends on the sequence, so there are no merged weights to hand over"),
    ):
        if getattr(args, name, False):
            raise ValueError(f"--{name} does not work with PTE: {reason}.")
    if getattr(args, "sequence_parallel_size", 1) > 1:
        raise ValueError("--sequence_parallel_size above 1 does not work with PTE: segments follow one another.")
    if args.task_type != "causal_lm":
        raise ValueError(f"--task_type {args.task_type} does not work with PTE: use causal_lm.")
    if getattr(args, "rlhf_type", None) not in TRIED:
        raise ValueError(f"--rlhf_type {args.rlhf_type} has not been tried with PTE; {TRIED[1:]} have.")


def with_prompt_lengths(data_collator: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Let the collator say where each row's completion begins.

    The model cannot see it: swift's trainers cut the labels down to the columns whose logits they want, or keep them to
    themselves, and what is left (`logits_to_keep`) is one number for all rows. A model without PTE ignores the entry.
    """

    @functools.wraps(data_collator)
    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = data_collator(*args, **kwargs)
        labels = batch.get("labels")
        if isinstance(labels, torch.Tensor) and labels.ndim == 2:
            is_label = labels != -100
            first = is_label.int().argmax(-1)
            batch["prompt_lengths"] = torch.where(is_label.any(-1), first, labels.shape[1])
        return batch

    return wrapper


# On import, since that is what swift repeats in the workers of a data loader.
Template.data_collator = with_prompt_lengths(Template.data_collator)
tuners_map["pte"] = PTETuner
