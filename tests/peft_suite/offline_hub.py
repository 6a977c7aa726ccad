"""pytest plugin (`-p offline_hub`): a local Hub cache of tiny models, so that PEFT's own tests run with no network.

The repositories that the tests ask for are built with random weights in the layout of the Hub's cache, in the folder
named by `PEFT_SUITE_HUB`. Importing this module sets the environment, so it has to come before any Hugging Face import.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HUB = Path(os.environ.setdefault("PEFT_SUITE_HUB", tempfile.mkdtemp(prefix="peft_suite_hub_")))
os.environ["HF_HUB_CACHE"] = str(HUB)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# The key/value width (32) is larger than the ranks in use: a thought state of rank r wants d_kv >= r.
SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Names that PEFT's tests use, with the family of transformers that stands behind them.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("Llama", {}),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2", {}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3", {"head_dim": 16}),
}
# test_config.py reads a LoRA configuration from this repository, at this revision.
ADAPTER, ADAPTER_REVISION = "peft-internal-testing/tiny-opt-lora-revision", "test"


def repository(name: str) -> Path:
    """The folder of a model repository in a Hub cache, relative to the cache."""
    return Path("models--" + name.replace("/", "--"))


def write_repository(name: str, save: Callable[[Path], Any], revisions: tuple[str, ...] = ("main",)) -> None:
    """Create a repository with one commit; `save` writes its files into the folder that it is given."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    snapshot = HUB / repository(name) / "snapshots" / commit
    snapshot.mkdir(parents=True)
    save(snapshot)
    refs = HUB / repository(name) / "refs"
    refs.mkdir()
    for revision in revisions:
        (refs / revision).write_text(commit)


def build() -> None:
    """Create every repository that is not there yet."""
    import torch
    import transformers
    from peft import LoraConfig

    for name, (family, special) in MODELS.items():
        if not (HUB / repository(name)).exists():
            torch.manual_seed(0)
            config = getattr(transformers, f"{family}Config")(**(SIZES | special))
            model = getattr(transformers, f"{family}ForCausalLM")(config)
            write_repository(name, model.save_pretrained)
    if not (HUB / repository(ADAPTER)).exists():
        write_repository(ADAPTER, LoraConfig(r=8).save_pretrained, ("main", ADAPTER_REVISION))


def download_from_local_hub(download: Callable[..., str]) -> Callable[..., str]:
    """`hf_hub_download` whose remote side is the local Hub: another `cache_dir` is filled from there first."""

    def wrapper(repo_id: str, filename: str, *args: Any, cache_dir: str | None = None, **kwargs: Any) -> str:
        source = HUB / repository(repo_id)
        if cache_dir is not None and source.exists():
            shutil.copytree(source, Path(cache_dir) / repository(repo_id), dirs_exist_ok=True)
        return download(repo_id, filename, *args, cache_dir=cache_dir, **kwargs)

    return wrapper


def pytest_configure(config: pytest.Config) -> None:
    """Build the Hub once (workers of pytest-xdist find it there), and keep the tests from asking for the real one."""
    if not hasattr(config, "workerinput"):
        build()
    import peft.config
    import tests.testing_utils

    peft.config.hf_hub_download = download_from_local_hub(peft.config.hf_hub_download)
    # `hub_online_once` goes online for every name that it has not seen.
    tests.testing_utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 1))
