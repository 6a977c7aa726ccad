"""The benchmarks of long generations and of the paper's shapes, in small."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import long_generation
import pytest
import shapes


def test_long_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache holds the same after each mark, the state matters, and what was noted is what is replayed."""
    path = tmp_path / "rows.csv"
    monkeypatch.setattr(
        "sys.argv", ["", "--tokens", "1536", "--window-size", "48", "--layers", "1", f"--output={path}"]
    )
    monkeypatch.setattr(long_generation, "MARKS", (512, 1024))
    long_generation.main()
    rows = list(csv.DictReader(path.open()))
    assert [int(row["tokens"]) for row in rows] == [512, 1024, 1536]
    assert len({row["cache_bytes"] for row in rows}) == 1
    assert all(float(row["ms_per_token"]) > 0 and float(row["core_norm"]) > 0 for row in rows)
    assert [bool(row["difference"]) for row in rows] == [False, False, True]
    assert float(rows[-1]["difference"]) <= 1e-4


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: the replay of a model that has changed is another one."""
    options = long_generation.argparse.Namespace(device="cpu", layers=1, window_size=48, std=0.1, dtype=None)
    model, replay = long_generation.make_model(options, "small"), long_generation.sequence_logprobs

    def changed(*args, **kwargs):
        for name, parameter in model.named_parameters():
            if "pte_A" in name:
                parameter.data.zero_()
        return replay(*args, **kwargs)

    monkeypatch.setattr(long_generation, "sequence_logprobs", changed)
    rows: list[dict[str, Any]] = []
    long_generation.generate(model, (512,), "cpu", rows.append)
    assert len(rows) == 1 and rows[0]["difference"] > 1e-2


def test_tokens_are_whole_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["", "--tokens", "700"])
    with pytest.raises(SystemExit):
        long_generation.main()


def test_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are what the widths say, and all steps of a user's way run."""
    path = tmp_path / "shapes.csv"
    monkeypatch.setattr("sys.argv", ["", "--shapes", "small", "--run", "--layers", "1", f"--output={path}"])
    shapes.main()
    (row,) = csv.DictReader(path.open())
    config = shapes.memory.SHAPES["small"]()
    slot = 2 * config.num_key_value_heads * config.head_dim * 2 * config.num_hidden_layers  # in bfloat16
    assert int(row["full_bytes_3072"]) == 3072 * slot
    for window in shapes.WINDOWS:
        beyond = int(row[f"pte_bytes_window_{window}"]) - (64 + window) * slot
        assert 0 < beyond < 4 * config.num_hidden_layers * (3 * 32 * 32 + 4 * window)  # states; positions
    assert float(row["loaded_differs_by"]) == 0 and float(row["exported_differs_by"]) <= 1e-5
