"""The examples and benchmarks run, on a checkpoint and a file as a user would have them."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from models import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")  # several threads beside other tests are many times slower
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


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
    """Checkpointed, a token costs its keys and values; offloaded or truncated, nothing on the device."""
    lora, kept, offload, truncated = (
        "LoRA, full cache, checkpointed",
        "PTE, checkpointed, head",
        "PTE, checkpointed, offload, head",
        "PTE, truncated, head",
    )
    arms = ["--only", lora, kept, offload, truncated]
    done = run("benchmarks/memory.py", *arms, "--lengths", 768, 1536, "--output", tmp_path / "memory.csv")
    assert done.returncode == 0, done.stderr
    rows = {(row["arm"], int(row["length"])): row for row in csv.DictReader((tmp_path / "memory.csv").open())}

    def value(arm: str, length: int, column: str = "peak_bytes") -> int:
        return int(rows[arm, length][column])

    keys_and_values = 4 * 4 * 2 * 128  # float32; 4 layers, keys and values of 128
    per_token = (value(kept, 1536, "saved_bytes") - value(kept, 768, "saved_bytes")) / 768
    assert keys_and_values <= per_token <= 1.15 * keys_and_values  # and a core a segment
    for arm in (offload, truncated):
        assert value(arm, 1536) <= 1.02 * value(arm, 768)
        host_per_token = (value(arm, 1536, "host_bytes") - value(arm, 768, "host_bytes")) / 768
        assert keys_and_values <= host_per_token <= 1.2 * keys_and_values
    assert value(lora, 1536) > 1.5 * value(lora, 768)
    assert (tmp_path / "memory.png").exists()


def test_gpu_benchmark_runs_without_a_gpu(tmp_path: Path) -> None:
    """The same checks and measurements on the CPU, one by one; correctness is recorded before anything is measured."""
    options = ["--device", "cpu", "--shapes", "small", "--lengths", 512, "--window-size", 64, "--output", tmp_path]
    done = run("benchmarks/gpu.py", *options, "--only", "correctness", "kernels", "encode", "apply", "decode", "train")
    assert done.returncode == 0, done.stderr
    tables = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.glob("*.csv")}
    checks = tables.pop("gpu_correctness")
    assert all(row["passed"] == "True" for row in checks)
    names = {row["check"].split(" ")[0].rstrip(":") for row in checks}
    assert names > {
        "replay",
        "encode",
        "read_state",
        "compact",
        "low_rank_update",
        "token_logprobs",
        "decode_attention",
    }
    assert set(tables) == {"gpu_encode", "gpu_apply", "gpu_decode", "gpu_train"}
    for rows in tables.values():
        assert rows and not any(row["error"] for row in rows)
        assert all("times say nothing" in row["note"] for row in rows)
    assert run("benchmarks/plot.py", "--folder", tmp_path).returncode == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == set(tables)


def test_gpu_benchmark_stops_when_time_is_up(tmp_path: Path) -> None:
    """Nothing new is begun then."""
    options = ["--device", "cpu", "--shapes", "small", "--lengths", 512, "--output", tmp_path, "--only", "memory"]
    done = run("benchmarks/gpu.py", *options, "--minutes", 0.001)
    assert done.returncode == 0 and "time is up" in done.stdout, done.stderr
