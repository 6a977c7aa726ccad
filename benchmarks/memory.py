"""Memory of one training step against the length of the sequence: LoRA with a full cache, and PTE.

    python benchmarks/memory.py                                    # CPU, exact bytes, about 5 minutes
    python benchmarks/memory.py --device cuda --shape qwen2.5-3b   # GPU, by the allocator
    python benchmarks/memory.py --plot benchmarks/results/memory_cpu.csv

On the CPU every storage that an operation makes is counted until it is freed, so the figures are exact and repeatable:
`saved` is what is alive after the forward (beyond parameters and inputs), `peak` the most during forward and backward,
`host` the most that waits in host memory (on the CPU: would wait there if a GPU were the device). On a GPU the figures
are the allocator's, without `host`. Weights are random; B = 1.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from peft_pte import PTEConfig, sequence_logprobs
from peft_pte.replay.segments import host_copy

PROMPT = 64
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA3_ROPE: dict[str, Any] = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
# Qwen2.5-3B-Instruct, Qwen2.5-7B-Instruct, DeepSeek-R1-Distill-Llama-8B, by the values of their config.json.
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "small": lambda: LlamaConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,
    ),
    "qwen2.5-3b": lambda: Qwen2Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        tie_word_embeddings=True,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "llama-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_theta=5e5, **LLAMA3_ROPE),
        bos_token_id=128000,
        eos_token_id=128001,
    ),
}
# Name: (adapter or PTE's gradient, gradient checkpointing, log-probability head instead of logits).
ARMS: dict[str, tuple[str, bool, bool]] = {
    "LoRA, full cache": ("lora", False, False),
    "LoRA, full cache, checkpointed": ("lora", True, False),
    "PTE": ("full", False, False),
    "PTE, head": ("full", False, True),
    "PTE, checkpointed": ("full", True, False),
    "PTE, checkpointed, head": ("full", True, True),
    "PTE, checkpointed, offload, head": ("offload", True, True),
    "PTE, truncated, head": ("truncated", False, True),
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside, until they are freed: the device's, and those of `host_copy`."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = {"device": 0, "host": 0}
        self.peak = dict(self.live)
        self.place = "device"

    def __enter__(self) -> LiveBytes:
        self.patch = patch("peft_pte.replay.segments.host_copy", self.host_copy)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.stop()
        super().__exit__(*error)

    def host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        self.place = "host"
        copy = host_copy(tensor)
        self.place = "device"
        return copy

    def _free(self, key: int, place: str) -> None:
        self.live[place] -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in before or key in self.sizes:  # a view, or written in place
                continue
            self.sizes[key] = storage.nbytes()
            self.live[self.place] += storage.nbytes()
            self.peak[self.place] = max(self.peak[self.place], self.live[self.place])
            weakref.finalize(storage, self._free, key, self.place)
        return out


def make_base(shape: str, device: str, layers: int | None = None) -> torch.nn.Module:
    """With random weights, in float32 on the CPU and in bfloat16 elsewhere; `layers`: fewer than the shape has."""
    config = SHAPES[shape]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)


def make_model(shape: str, adapter: str, checkpointing: bool, window: int, device: str) -> torch.nn.Module:
    base = make_base(shape, device)
    if adapter == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=32, target_modules=PROJECTIONS)
    else:
        settings = dict(offload=True) if adapter == "offload" else dict(gradient=adapter)
        config = PTEConfig(task_type="CAUSAL_LM", window_size=window, **settings)
    model = get_peft_model(base, config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def measure(arm: str, length: int, options: argparse.Namespace) -> dict[str, Any]:
    """One forward and backward; bytes beyond what was there before."""
    adapter, checkpointing, head = ARMS[arm]
    model = make_model(options.shape, adapter, checkpointing, options.window_size, options.device)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=options.device)
    labels = ids.clone()
    labels[:, :PROMPT] = -100

    def loss() -> torch.Tensor:
        if head:
            return -sequence_logprobs(model, ids, prompt_lengths=PROMPT)[0].sum() / (length - PROMPT)
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    host: int | str = ""
    start = time.time()
    if options.device == "cuda":
        loss().backward()  # gradients exist, and what is built on first use
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_allocated(), time.time()
        torch.cuda.reset_peak_memory_stats()
        value = loss()
        saved = torch.cuda.memory_allocated() - before
        value.backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with LiveBytes() as bytes_now:
            value = loss()
            saved = bytes_now.live["device"]
            value.backward()
        peak, host = bytes_now.peak["device"], bytes_now.peak["host"]
    seconds = round(time.time() - start, 2)
    return dict(arm=arm, length=length, saved_bytes=saved, peak_bytes=peak, host_bytes=host, seconds=seconds)


def plot(path: Path) -> None:
    """Peak and saved bytes against length, next to the CSV."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(csv.DictReader(path.open()))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, column, title in zip(axes, ("saved_bytes", "peak_bytes"), ("alive after the forward", "peak")):
        for arm in dict.fromkeys(row["arm"] for row in rows):
            points = [(int(row["length"]), int(row[column]) / 2**20) for row in rows if row["arm"] == arm]
            axis.plot(*zip(*points), marker="o", label=arm)
        axis.set(title=title, xlabel="tokens", ylabel="MiB", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def provenance(device: str, command: str) -> dict[str, str]:
    """Where figures come from."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return dict(
        card=torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU",
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        commit=commit.stdout.strip(),
        command=command,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--window-size", type=int, default=256)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, help="CSV file (default: benchmarks/results/memory_<device>.csv)")
    parser.add_argument("--plot", type=Path, help="only draw from this CSV file")
    options = parser.parse_args()
    if options.plot:
        return plot(options.plot)
    output = options.output or Path(__file__).parent / "results" / f"memory_{options.device}.csv"
    command = " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]])
    about = dict(shape=options.shape, window_size=options.window_size) | provenance(options.device, command)
    rows = []
    for arm in options.only:
        for length in options.lengths:
            try:
                rows.append(measure(arm, length, options) | about)
            except torch.cuda.OutOfMemoryError:
                print(f"{arm:<36} {length:>7} out of memory", flush=True)
                torch.cuda.empty_cache()
                break
            row = rows[-1]
            sizes = f"saved {row['saved_bytes'] / 2**20:9.1f} MiB  peak {row['peak_bytes'] / 2**20:9.1f} MiB"
            print(f"{arm:<36} {length:>7} {sizes} {row['seconds']:7.2f} s", flush=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(output)


if __name__ == "__main__":
    main()
