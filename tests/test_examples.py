"""The examples and benchmarks run, on a checkpoint and a file as a user would have them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import torch
from models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)


def test_quickstart_on_a_checkpoint_and_json_lines(tmp_path: Path) -> None:
    """All arms, table, plot, adapter, and a new process that generates with it."""
    tiny_model("llama", torch.float32).save_pretrained(tmp_path / "model")
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", bos_token="w1", eos_token="w2")
    tokens.save_pretrained(tmp_path / "model")
    line = json.dumps(dict(prompt="w5 w6 w7", completion=" ".join(f"w{3 + i % 50}" for i in range(40))))
    (tmp_path / "data.jsonl").write_text("\n".join([line] * 12))
    options = ["--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"]
    done = run("examples/quickstart.py", *options, "--steps", 3, "--batch-size", 2, "--window-size", 8, "--rank", 4)
    assert done.returncode == 0, done.stderr
    assert "a new process" in done.stdout and "thoughts were evicted" in done.stdout
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["base, full cache", "LoRA, same window", "Global-only", "PTE"]
    assert all(
        list(row["scores"]) == ["thoughts 0-8", "thoughts 8-16", "thoughts 16-32", "thoughts 32-"] for row in rows
    )
    assert (tmp_path / "out" / "plot.png").stat().st_size > 1000
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_quickstart_says_what_is_missing(tmp_path: Path) -> None:
    assert "--model and --data go together" in run("examples/quickstart.py", "--model", "some/model").stderr


def test_memory_benchmark_counts_what_the_backward_pass_needs(tmp_path: Path) -> None:
    """With checkpointing and the log-probability head a token costs its keys, values and one hidden state."""
    arms = ["--only", "LoRA, full cache", "PTE, checkpointed, head"]
    done = run("benchmarks/memory.py", *arms, "--lengths", 512, 1024, "--output", tmp_path / "memory.csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "memory.csv").open()))
    saved = {(row["arm"], int(row["length"])): int(row["saved_bytes"]) for row in rows}
    per_token = (saved[arms[2], 1024] - saved[arms[2], 512]) / 512
    keys_values_and_hidden = 4 * (4 * 2 * 128 + 256)  # float32; 4 layers, keys and values of 128; width 256
    assert keys_values_and_hidden <= per_token <= 1.2 * keys_values_and_hidden  # and a core a segment
    assert saved[arms[2], 1024] < saved[arms[1], 1024] / 5
    assert (tmp_path / "memory.png").exists()
