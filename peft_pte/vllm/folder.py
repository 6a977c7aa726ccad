"""What vLLM loads: a base model whose configuration names an adapter, and how that is written and read.

In the model's configuration stand `architectures` with a name of ours (models.py), `pte` with the two fields of
`Served`, and `rswa_window`, which makes vLLM tell its attention layers how long the prompts are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..config import PTEConfig
from ..encoder import ENCODER_NAME
from ..static import pte_adapter

# By the model type of the base. The names under which models.py is registered.
ARCHITECTURES = {"llama": "PTELlamaForCausalLM", "qwen2": "PTEQwen2ForCausalLM", "qwen3": "PTEQwen3ForCausalLM"}
KEPT = "pte_served"  # the attribute of vLLM's `ModelConfig`; processes of an engine get it along
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# What a model's folder holds besides weights: configurations, tokenizer, chat template.
MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
# An adapter's weights as PEFT saves them, and their names in the model under vLLM.
NAMES = (
    (r"base_model\.model\.(.*\.self_attn)\.([qkvo]_proj)\.pte_(A|B|gate)\.weight", r"\1.low_rank.\2.\3"),
    (r"base_model\.model\.(.*\.self_attn\.thought_encoder\.pte_\w+)\.weight", r"\1.default.weight"),
)


class Served(NamedTuple):
    """An adapter under vLLM. `folder`: on this machine. `max_prompt_length`: prompts that there are slots for."""

    folder: Path
    config: PTEConfig
    max_prompt_length: int

    def check_prompt(self, length: int, error: type[Exception]) -> None:
        """Raise `error` if a prompt is longer than there are slots for."""
        if self.config.retained_prefix == "prompt" and length > self.max_prompt_length:
            raise error(
                f"The prompt has {length} tokens, but `max_prompt_length` is {self.max_prompt_length}, and "
                f"retained_prefix='prompt' keeps all of it. Export with max_prompt_length={length} or more, or train "
                "with an integer `retained_prefix`: then the rest of a prompt streams through the window."
            )


def served(model_config: Any) -> Served:
    """The adapter that vLLM's `ModelConfig` names. It is read once for each such object, and stays with it.

    A running engine keeps the configuration that it was built on, whatever is saved in the folder later; the next
    engine reads what is there then.

    Raises:
        ValueError: the configuration names none.
    """
    if (found := vars(model_config).get(KEPT)) is not None:
        return found
    entry = getattr(model_config.hf_config, "pte", None)
    if not isinstance(entry, dict) or set(entry) != {"adapter", "max_prompt_length"}:
        raise ValueError(
            f"The model's configuration has `pte` = {entry!r}, but must name an adapter. Write the folder with "
            "`peft_pte.vllm.export`, or take `hf_overrides=peft_pte.vllm.overrides(...)`."
        )
    found = read(str(model_config.model), str(entry["adapter"]), int(entry["max_prompt_length"]))
    setattr(model_config, KEPT, found)
    return found


def read(model: str, adapter: str, max_prompt_length: int) -> Served:
    """As `served`. `adapter`: a folder, also one inside of the model's, or a name on the Hub."""
    parent = Path(model)
    if not parent.is_dir() and not Path(adapter).is_dir():  # a model from the Hub, which may bring its adapter along
        parent = Path(snapshot_download(model, allow_patterns=[f"{adapter}/{name}" for name in ADAPTER_FILES]))
    folder = parent / adapter if (parent / adapter).is_dir() else adapter_folder(adapter)
    return Served(folder, checked_config(folder), max_prompt_length)


def adapter_folder(adapter: str) -> Path:
    """A folder with an adapter, from the disk or the Hub.

    Raises:
        FileNotFoundError: there are no weights in safetensors, or no configuration.
    """
    folder = Path(adapter if Path(adapter).is_dir() else snapshot_download(adapter, allow_patterns=list(ADAPTER_FILES)))
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"`adapter` is {adapter!r}, in which there is no {missing[0]}. Save it with `model.save_pretrained(folder)`"
            " (safetensors, PEFT's default)."
        )
    return folder


def checked_config(folder: Path) -> PTEConfig:
    """The configuration of an adapter.

    Raises:
        ValueError: it is of another method.
    """
    config = PTEConfig.from_pretrained(str(folder))
    if not isinstance(config, PTEConfig):
        raise ValueError(f"The adapter in {str(folder)!r} is of type {config.peft_type}, but must be a PTE adapter.")
    return config


def engine_name(name: str) -> str:
    """The name that a weight of an adapter has in the model under vLLM.

    Raises:
        ValueError: it belongs to no attention layer.
    """
    for pattern, replacement in NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise ValueError(
        f"The adapter holds {name!r}, which vLLM cannot take: only PTE's own weights, and no modules that were saved "
        "in full (`modules_to_save`, `trainable_token_indices`). Write those into the base model first."
    )


def weight_names(folder: Path) -> set[str]:
    """The names in the model under vLLM of what an adapter holds."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        return {engine_name(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)


def adapter_weights(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    """An adapter's weights by their names in the model under vLLM, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {engine_name(name): weight.detach().cpu().contiguous() for name, weight in state.items()}


def base_weights(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of the base model by the names that they have without an adapter."""
    for name, parameter in model.get_base_model().named_parameters():
        if ".pte_" not in name and ENCODER_NAME not in name.split("."):
            yield name.replace(".base_layer.", "."), parameter


def entries(model_type: str, adapter: str, config: PTEConfig, max_prompt_length: int) -> dict[str, Any]:
    """What is said of an adapter in the configuration of its base model.

    Raises:
        ValueError: the base is of a family that is not supported, or the number is none.
    """
    if model_type not in ARCHITECTURES:
        raise ValueError(f"`base` is of type {model_type!r}, but PTE runs under vLLM on {', '.join(ARCHITECTURES)}.")
    if isinstance(max_prompt_length, bool) or not isinstance(max_prompt_length, int) or max_prompt_length < 1:
        raise ValueError(f"`max_prompt_length` is {max_prompt_length!r}, but must be a positive integer.")
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "rswa_window": config.cache_policy.window(max_prompt_length),
        "pte": {"adapter": adapter, "max_prompt_length": max_prompt_length},
    }


def overrides(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str], max_prompt_length: int = 1024
) -> dict[str, Any]:
    """The `hf_overrides` with which `LLM(base, hf_overrides=...)` serves an adapter without a copy of the base.

    Args:
        base: the folder of the base model, or its name on the Hub.
        adapter: a folder that `model.save_pretrained` wrote, or a name on the Hub. Workers read it, too.
        max_prompt_length: as in `export`.

    Raises:
        ValueError: as `export`. FileNotFoundError: as `export`.
    """
    folder = adapter_folder(str(adapter))
    weight_names(folder)  # which refuses others
    model_type = AutoConfig.from_pretrained(str(base)).model_type
    return entries(model_type, str(folder.resolve()), checked_config(folder), max_prompt_length)


def export(
    base: str | os.PathLike[str] | PreTrainedModel,
    adapter: str | os.PathLike[str] | PeftModel,
    folder: str | os.PathLike[str],
    max_prompt_length: int = 1024,
) -> Path:
    """Write a folder that `LLM(folder)` and `vllm serve folder` load: base, tokenizer and adapter, in safetensors.

    Args:
        base: the folder of the base model, its name on the Hub, or the model itself, without an adapter.
        adapter: a folder that `model.save_pretrained` wrote, a name on the Hub, or a model, whose active adapter is
            taken.
        folder: must be empty or not there.
        max_prompt_length: the longest prompt that there is to be room for, with `retained_prefix="prompt"`; every
            request has so many slots, and `window_size` more. It has no effect with an integer `retained_prefix`.

    Returns:
        `folder`.

    Raises:
        ValueError: the base is of another family than Llama, Qwen2 and Qwen3 or has an adapter in it, the adapter is
            of another method or holds weights besides PTE's own, or `folder` is not empty.
        FileNotFoundError: base or adapter have no safetensors.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"`folder` is {str(folder)!r}, which is not empty: give another one.")
    if isinstance(base, nn.Module) and (hasattr(base, "pte_attachment") or not isinstance(base, PreTrainedModel)):
        raise ValueError(
            f"`base` is a {type(base).__name__} with an adapter in it, or none of transformers' models: give the "
            "folder of the base model, or its name on the Hub."
        )
    # All that can be refused is looked at before anything is written.
    if isinstance(adapter, nn.Module):
        name, config = pte_adapter(adapter, None)
        adapter_weights(adapter, name)
    else:
        source = adapter_folder(str(adapter))
        name, config = "default", checked_config(source)
        weight_names(source)
    inside = saved_in(name)
    base_config = base.config if isinstance(base, nn.Module) else AutoConfig.from_pretrained(str(base))
    added = entries(base_config.model_type, inside, config, max_prompt_length)
    if isinstance(base, nn.Module):
        base.save_pretrained(folder)
    else:
        copy_model(base, folder)
    if isinstance(adapter, nn.Module):
        adapter.save_pretrained(folder / "adapter", selected_adapters=[name])
    else:
        (folder / inside).mkdir()
        for file in ADAPTER_FILES:
            shutil.copyfile(source / file, folder / inside / file)
    add_entries(folder, added)
    return folder


def saved_in(adapter_name: str) -> str:
    """Where PEFT saves an adapter inside of a model's folder here."""
    return "adapter" if adapter_name == "default" else f"adapter/{adapter_name}"


def add_entries(folder: Path, added: dict[str, Any]) -> None:
    """Put entries into the configuration of a model's folder."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | added, indent=2) + "\n")


def copy_model(base: str | os.PathLike[str], folder: Path) -> None:
    """Copy a model without what is not needed, above all without pickles."""
    is_local = Path(base).is_dir()
    source = Path(base if is_local else snapshot_download(str(base), allow_patterns=list(MODEL_FILES)))
    for needed in ("*.safetensors", "config.json"):
        if not any(source.glob(needed)):
            raise FileNotFoundError(
                f"`base` is {str(base)!r}, in which there is no {needed}: save it with `save_pretrained`."
            )
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in MODEL_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)
