"""Progressive Thought Encoding as an adapter of axolotl 0.19.

    plugins: [axolotl_pte.PTEPlugin]        # in the run's YAML
    adapter: pte
    pte: {r: 32, pte_alpha: 16, window_size: 1024}

    PYTHONPATH=examples/plugins axolotl train run.yaml

The block `pte` holds fields of `PTEConfig`. Of axolotl's own options, `lora_r`, `lora_alpha`, `lora_dropout`,
`lora_target_modules` and the others below are taken where the block does not name their field. Checkpoints are ordinary
PEFT adapters; `lora_model_dir` loads one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel
from transformers import PreTrainedModel

from peft_pte import PTEConfig

FIELDS = dict(
    lora_r="r",
    lora_alpha="pte_alpha",
    lora_dropout="pte_dropout",
    lora_target_modules="target_modules",
    lora_modules_to_save="modules_to_save",
    peft_layers_to_transform="layers_to_transform",
    peft_layers_pattern="layers_pattern",
    peft_trainable_token_indices="trainable_token_indices",
)
# Of these each would be ignored in silence.
MEANINGLESS = (
    "lora_target_linear",
    "lora_target_parameters",
    "lora_rank_pattern",
    "lora_alpha_pattern",
    "peft_use_dora",
    "peft_use_rslora",
    "peft_layer_replication",
    "peft_init_lora_weights",
    "loraplus_lr_ratio",
    "relora",
)
TRIED = (None, "dpo", "grpo")  # `rl`
PACKING = ("sample_packing", "eval_sample_packing", "batch_flattening")


class PTEArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    pte: dict[str, Any] | None = None


class PTEPlugin(BasePlugin):
    """Registers the adapter "pte" and loads it."""

    def get_input_args(self) -> str:
        """Where axolotl finds the schema of the block `pte`."""
        return f"{__name__}.{PTEArgs.__name__}"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Not `lora_like`: axolotl would build a `LoraConfig`, and merge."""
        return [AdapterCapabilities(name="pte")]

    def load_adapter(
        self, model: PreTrainedModel, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[PreTrainedModel | PeftModel | None, PTEConfig] | None:
        """A new adapter or a saved one on the model; `config_only` where a trainer of TRL attaches it itself."""
        if cfg.adapter != "pte":
            return None
        refuse(cfg)
        config = pte_config(cfg)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, model.peft_config["default"]
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """TRL 1.9's DPO trainer keeps to itself where completions begin (later ones pass labels): let it pass that."""
        if cfg.adapter == "pte" and cfg.rl == "dpo":
            trainer.data_collator = with_prompt_lengths(trainer.data_collator)


def with_prompt_lengths(data_collator: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The collator, which also says in which column each row's completion begins."""

    def wrapper(*args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = data_collator(*args, **kwargs)
        return batch | {"prompt_lengths": batch["completion_mask"].int().argmax(-1)}

    return wrapper


def pte_config(cfg: Any) -> PTEConfig:
    """The configuration that the block `pte`, and else axolotl's own options, ask for."""
    options = {field: cfg[name] for name, field in FIELDS.items() if cfg[name] is not None}
    return PTEConfig(task_type="CAUSAL_LM", **(options | dict(cfg.pte or {})))


def refuse(cfg: Any) -> None:
    """What cannot work, or would have no effect."""
    for name in MEANINGLESS:
        if cfg[name]:
            raise ValueError(f"`{name}` has no meaning for `adapter: pte`: leave it out.")
    for name in PACKING:
        if cfg[name]:
            raise ValueError(f"`{name}` does not work with `adapter: pte`: there is one thought state per row.")
    if cfg.rl not in TRIED:
        raise ValueError(f"`rl: {cfg.rl}` has not been tried with `adapter: pte`; {TRIED[1:]} have.")
    if cfg.trl and cfg.trl.use_vllm:
        raise ValueError("`trl.use_vllm` does not work with `adapter: pte`: its update depends on the sequence.")
    if (cfg.context_parallel_size or 1) > 1:
        raise ValueError("`context_parallel_size` does not work with `adapter: pte`: segments follow one another.")
