"""The examples run, on a checkpoint and a file as a user would have them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, QUICKSTART, *map(str, arguments)], capture_output=True, text=True)


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
    done = run(*options, "--steps", 3, "--batch-size", 2, "--window-size", 8, "--rank", 4)
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
    assert "--model and --data go together" in run("--model", "some/model").stderr
