"""Everything that is to be run on a GPU, in one command and in the order of importance.

    python benchmarks/gpu.py                                   # about 10 minutes on one GPU
    python benchmarks/gpu.py --only correctness                # parts: correctness, memory
    python benchmarks/gpu.py --device cpu --shapes small --lengths 1024 2048   # the same path without a GPU

Correctness comes first, and nothing is measured if it fails. Results go to `benchmarks/results/gpu_<part>.csv` row by
row, so that an interrupted run keeps what it has; each row names card, versions, commit and command.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import memory
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_pte import PTECache, PTEConfig, sequence_logprobs

PROMPT, LENGTH = 20, 220


def tiny(device: str, dtype: torch.dtype, **settings: Any) -> torch.nn.Module:
    """A small model with a random adapter that evicts many times in `LENGTH` tokens."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    config = PTEConfig(task_type="CAUSAL_LM", window_size=32, init_weights=False, pte_alpha=1, **settings)
    return get_peft_model(base, config, autocast_adapter_dtype=False).to(device, dtype)


def batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of different lengths, and thoughts."""
    ids = torch.randint(3, 512, (4, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 7, 12)):
        mask[row, :padding] = 0
    return ids, mask


def replay_against_decoding(device: str, dtype: torch.dtype) -> float:
    """Largest difference of log-probabilities between the replay and token-by-token decoding."""
    model = tiny(device, dtype).eval()
    ids, mask = batch(device)
    with torch.no_grad():
        replayed, _ = sequence_logprobs(model, ids, mask, PROMPT)
        cache, start, logits = PTECache(), 0, []
        for end in range(PROMPT, LENGTH):
            step = dict(input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(model(**step).logits[:, -1].float())
            start = end
    decoded = torch.stack(logits, dim=1).log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
    return (replayed[:, PROMPT:] - decoded).abs().max().item()


def gradients(model: torch.nn.Module, device: str) -> torch.Tensor:
    ids, mask = batch(device)
    model.zero_grad()
    sequence_logprobs(model.train(), ids, mask, PROMPT)[0].mean().backward()
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def gradients_of_two_ways(device: str, dtype: torch.dtype, gradient: str) -> float:
    """Relative difference of gradients: offloaded or truncated in two passes, against ordinary autograd."""
    if gradient == "truncated":
        model = tiny(device, dtype, gradient="truncated")
        actual = gradients(model, device)
        with patch("peft_pte.replay.is_sharded", lambda parameters: True):
            expected = gradients(model, device)
    else:
        expected = gradients(tiny(device, dtype), device)
        offloading = tiny(device, dtype, offload=True)
        offloading.gradient_checkpointing_enable()
        actual = gradients(offloading, device)
    return ((actual - expected).norm() / expected.norm()).item()


# Name: (check, largest allowed value in float32, and in bfloat16, whose rounding differs from way to way).
CHECKS: dict[str, tuple[Callable[[str, torch.dtype], float], float, float]] = {
    "replay = decoding": (replay_against_decoding, 1e-4, 0.25),
    "offload = plain gradients": (lambda *at: gradients_of_two_ways(*at, "full"), 1e-4, 0.05),
    "truncated = ordinary autograd": (lambda *at: gradients_of_two_ways(*at, "truncated"), 1e-4, 0.05),
}


class Results:
    """A CSV file that grows row by row."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about, self.rows = path, about, []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | self.about)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def correctness(options: argparse.Namespace, results: Results) -> bool:
    good = True
    for name, (check, *limits) in CHECKS.items():
        for dtype, limit in zip((torch.float32, torch.bfloat16), limits):
            value = check(options.device, dtype)
            good &= value <= limit
            results.add(dict(check=name, dtype=str(dtype), value=f"{value:.3g}", limit=limit, passed=value <= limit))
    return good


def measure_memory(options: argparse.Namespace, results: Results) -> None:
    """Shapes one after the other; longest lengths last, so that the time limit cuts those."""
    for shape in options.shapes:
        for arm in memory.ARMS:
            for length in options.lengths:
                if time.time() - options.start > options.minutes * 60:
                    return print("time is up")
                try:
                    options.shape = shape
                    results.add(dict(shape=shape) | memory.measure(arm, length, options))
                except torch.cuda.OutOfMemoryError:
                    sizes = dict(saved_bytes="out of memory", peak_bytes="", host_bytes="", seconds="")
                    results.add(dict(shape=shape, arm=arm, length=length) | sizes)
                    torch.cuda.empty_cache()
                    break  # longer ones do not fit either


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=["correctness", "memory"], default=["correctness", "memory"])
    parser.add_argument("--shapes", nargs="+", default=["qwen2.5-3b", "llama-8b", "qwen2.5-7b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[3072, 8192, 16384, 32768, 65536])
    parser.add_argument("--window-size", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing new is begun after that")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder")
    options = parser.parse_args()
    options.start = time.time()
    if options.device == "cuda":
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
        # Float32 checks compare with full precision, not with TF32.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    about = memory.provenance(options.device, " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]))
    options.output.mkdir(parents=True, exist_ok=True)
    if "correctness" in options.only and not correctness(
        options, Results(options.output / "gpu_correctness.csv", about)
    ):
        raise SystemExit("correctness failed: nothing is measured")
    if "memory" in options.only:
        measure_memory(options, Results(options.output / "gpu_memory.csv", about))


if __name__ == "__main__":
    main()
