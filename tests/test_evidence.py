"""The evidence benchmark runs, keeps what it has, and its numbers mean what they say."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from models import tiny_model

import report
import rl
from arms import ARMS, CHECKPOINT, adapt, states_swapped, states_zeroed
from peft_pte.encoder import ThoughtEncoder
from tasks import TASKS
from training import Settings

ROOT = Path(__file__).parents[1]
QUICK_ARMS = ["base, full cache", "base, windowed", "LoRA, windowed", "PTE"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, ROOT / "benchmarks" / "evidence", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def refusal(*arguments: object) -> str:
    """What is said to arguments that are refused before anything runs; in this process, since a new one takes long."""
    said = io.StringIO()
    with (
        patch.object(sys, "argv", ["evidence", *map(str, arguments)]),
        contextlib.redirect_stderr(said),
        pytest.raises((SystemExit, TypeError)) as error,
    ):
        runpy.run_path(str(ROOT / "benchmarks" / "evidence" / "__main__.py"), run_name="__main__")
    return f"{said.getvalue()} {error.value}"


def test_quick_run_report_and_repetition(tmp_path: Path) -> None:
    """All rows, a table and a figure; a second run of one cell replaces its rows with the same numbers."""
    folders = ["--output", tmp_path / "results", "--base", tmp_path / "base", "--quick", "--task", "recall"]
    done = run(*folders, "--seeds", 0, 1, "--arms", *QUICK_ARMS)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "results" / "recall.csv"
    rows = list(csv.DictReader(path.open()))
    # Three distances and one far beyond, the base once; on the way two distances at five steps; PTE also with two
    # controls at two.
    assert len(rows) == 2 * 4 + 2 * (2 * (4 + 5 * 2) + 2 * 2)
    for row in rows:
        assert (row["gradient_norm"] == "nan") == row["arm"].startswith("base")
        assert (row["state_norm"] == "") == (row["arm"] == "base, full cache")
        # What a LoRA under the window has of PTE writes nothing, and nothing is written where nothing has left.
        writes = row["arm"] == "PTE" and int(row["evictions"]) > 0
        assert row["core_norm"] == "" or (float(row["core_norm"]) > 0) == writes
    assert "void" in done.stdout and "states swapped, 24" in done.stdout
    assert path.with_suffix(".png").stat().st_size > 1000 and (path.parent / "README.md").exists()
    again = run(*folders, "--seeds", 1, "--arms", "PTE", "--processes", 1)
    assert again.returncode == 0, again.stderr

    def numbers(rows: list[dict[str, str]]) -> list[tuple[str, ...]]:
        return sorted(tuple(v for k, v in row.items() if k != "seconds") for row in rows)

    assert numbers(rows) == numbers(list(csv.DictReader(path.open())))


def test_another_difficulty_has_a_table_of_its_own(tmp_path: Path) -> None:
    folders = ["--output", tmp_path, "--base", tmp_path / "base", "--quick", "--task", "recall", "--seeds", 0]
    folders += ["--processes", 1]
    done = run(*folders, "--arms", "base, full cache", "--difficulty", "pairs=3", "queries=2")
    assert done.returncode == 0, done.stderr
    assert report.Results(tmp_path / "recall_3_pairs_2_queries.csv").difficulty == dict(pairs=3, queries=2)
    assert "recall has no hops" in refusal(*folders, "--difficulty", "hops=3")
    assert "invalid item value: 'pairs'" in refusal(*folders, "--difficulty", "pairs")


def test_accuracy_by_pairs(tmp_path: Path) -> None:
    """An oracle for each number of pairs: eight facts fit a state of width eight, and sixteen do not."""
    folders = [
        "--output",
        tmp_path,
        "--base",
        tmp_path / "base",
        "--quick",
        "--processes",
        1,
        "--task",
        "capacity",
        "--seeds",
        0,
    ]
    for pairs in (2, 16):
        done = run(*folders, "--arms", "oracle, rank 8", "--difficulty", f"pairs={pairs}")
        assert done.returncode == 0, done.stderr
    (line,) = [
        line for line in done.stdout.splitlines() if line.startswith("| oracle, rank 8 |") and line.count("|") == 4
    ]
    few, many = (float(cell) for cell in line.split("|")[2:4])
    assert few == 1.0 and 0.2 < many < 0.9
    assert (tmp_path / "capacity_by_pairs.png").stat().st_size > 1000
    assert "pairs of keys and values only" in run(*folders[:-3], "variables", "--arms", "oracle, rank 8").stderr


def test_rl_runs(tmp_path: Path) -> None:
    """A reward for each step, accuracies before and after, a table and a figure."""
    folders = ["--output", tmp_path, "--base", tmp_path / "base", "--quick", "--task", "variables", "--seeds", 0]
    done = run(*folders, "--rl", "--arms", "PTE", "--processes", 1)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "rl_variables.csv").open()))
    assert [row["step"] for row in rows if row["reward"]] == ["1", "2"]
    assert [(row["step"], row["distance"]) for row in rows if row["accuracy"]] == [
        (step, distance) for step in ("0", "2") for distance in ("24", "48")
    ]
    assert "| PTE | " in done.stdout and (tmp_path / "rl_variables.png").stat().st_size > 1000


def test_the_rl_prompt_ends_before_the_answer() -> None:
    """The reward compares with the token that the stream has there."""
    task, settings = TASKS["variables"], Settings(task="variables", base=Path())
    tokenizer = rl.tokenizer_of(task, settings.base)
    for row in rl.problems(settings, tokenizer, size=8, seed=0):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids == [int(word) for word in row["prompt"].split()]
        assert ids[:4] == [task.prompt_token] * 4 and ids[-1] in task.names and int(row["answer"]) in task.values
        said = tokenizer.batch_decode([[int(row["answer"])], [task.values.start], [0]], skip_special_tokens=True)
        expected = [1.0, float(int(row["answer"]) == task.values.start), 0.0]
        assert rl.reward(said, [row["answer"]] * 3) == expected


def test_controls_change_what_the_state_says() -> None:
    """Swapped: a row's logits after the first eviction depend on its neighbour's. Zeroed: on no evicted thought."""
    model = adapt(tiny_model("llama", torch.float32), ARMS["PTE"], rank=8, window_size=4)
    for name, parameter in model.named_parameters():
        if "pte_A" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 61, (2, 13), generator=generator)
    changed = ids.clone()
    changed[0, 3:5] = torch.tensor([5, 6])  # thoughts that have left when the last token comes

    def last(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, prompt_lengths=2, use_cache=False).logits[:, -1]

    plain = last(ids) - last(changed)
    with states_swapped():
        swapped = last(ids) - last(changed)
    with states_zeroed():
        zeroed = last(ids) - last(changed)
    assert plain[0].abs().max() > 1e-4 and plain[1].abs().max() < 1e-6
    assert swapped[1].abs().max() > 1e-4
    assert zeroed[1].abs().max() < 1e-6 and zeroed[0].abs().max() < plain[0].abs().max()


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.adapter in ("lora", "pte")])
def test_arms_train_what_they_should(arm: str) -> None:
    num_layers = 24 if arm in CHECKPOINT else 2  # as many as it names, or the usual
    with ARMS[arm].variant():
        base = tiny_model("llama", torch.float32, num_hidden_layers=num_layers).requires_grad_(False)
        model = adapt(base, ARMS[arm], rank=8, window_size=4)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0))
        border = dict(prompt_lengths=2) if ARMS[arm].windowed else {}
        model(input_ids=ids, labels=ids, use_cache=False, **border).loss.backward()
    assert ("thought_encoder.pte_gate" in str(trained)) == ("learned gate" in arm)
    assert trained and all(("lora_" if "LoRA" in arm else "pte_") in name for name in trained)
    assert any("pte_" in name for name, _ in model.named_parameters()) == ARMS[arm].windowed


@pytest.mark.parametrize(
    "gated_arm", ["PTE, first design, learned gate", "PTE, first design, learned gate on projections"]
)
@pytest.mark.parametrize("bias, same_as", [(60.0, nullcontext), (-60.0, states_zeroed)])
def test_a_gate_that_is_open_or_shut(
    gated_arm: str, bias: float, same_as: Callable[[], AbstractContextManager[None]]
) -> None:
    """Open: the delta rule of the package. Shut: nothing is written."""
    ids = torch.randint(3, 61, (2, 13), generator=torch.Generator().manual_seed(0))

    def logits(arm: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = adapt(tiny_model("llama", torch.float32), ARMS[arm], rank=8, window_size=4)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in sorted(model.named_parameters()):
            if "pte_gate" in name and "bias" in name:
                torch.nn.init.constant_(parameter, bias)
            elif "pte_" in name and "pte_gate" not in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        with torch.no_grad():
            return model(input_ids=ids, prompt_lengths=2, use_cache=False).logits

    with ARMS[gated_arm].variant():
        gated = logits(gated_arm)
    with same_as():
        torch.testing.assert_close(gated, logits("PTE, first design"), rtol=1e-4, atol=1e-5)


def test_starts_that_are_compared() -> None:
    """Larger values and an orthogonal query at the start, and nothing else."""

    def encoders(arm: str) -> list[ThoughtEncoder]:
        torch.manual_seed(0)
        with ARMS[arm].variant():
            model = adapt(tiny_model("llama", torch.float32), ARMS[arm], rank=8, window_size=4)
        return [module for module in model.modules() if isinstance(module, ThoughtEncoder)]

    usual, larger = encoders("PTE, first design"), encoders("PTE, first design, W_V starts 4 times as large")
    for encoder, other, turned in zip(usual, larger, encoders("PTE, first design, orthogonal query at the start")):
        torch.testing.assert_close(4 * encoder.pte_value["default"].weight, other.pte_value["default"].weight)
        assert torch.equal(encoder.pte_key["default"].weight, other.pte_key["default"].weight)
        query = turned.query("default")
        torch.testing.assert_close(query @ query.mT, torch.eye(8), rtol=0, atol=1e-4)
        assert not torch.allclose(query, torch.eye(8))


@pytest.mark.parametrize("folder", ["", "first_design"])
def test_tables_come_from_the_committed_results(tmp_path: Path, folder: str) -> None:
    """The README of the results says what the CSV files say."""
    committed = ROOT / "benchmarks" / "evidence" / "results" / folder
    for path in committed.glob("*.csv"):
        shutil.copy(path, tmp_path)
    report.report(tmp_path)
    assert (tmp_path / "README.md").read_text() == (committed / "README.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == {path.name for path in committed.glob("*.png")}


def test_distances_beyond_those_of_the_base_do_not_judge_a_table() -> None:
    results = report.Results(ROOT / "benchmarks" / "evidence" / "results" / "recall.csv")
    assert (results.farthest, results.distances[-1]) == (256, 4096)
    assert report.verdict(results).endswith("passed.")
    assert report.mean(results.get("base, full cache", 4096)) < report.GATE


def test_bootstrap() -> None:
    values = {seed: float(value) for seed, value in enumerate(torch.linspace(0, 1, 5))}
    assert report.mean_and_interval({0: 0.5}) == "0.50"
    assert report.mean_and_interval({seed: 0.25 for seed in range(5)}) == "0.25 [0.25, 0.25]"
    low, high = report.interval(torch.tensor(list(values.values()), dtype=torch.float64))
    assert 0.1 < low < 0.3 and 0.7 < high < 0.9
    assert report.difference(values, values) == "0.00 [0.00, 0.00]"
    assert report.difference({0: 1.0}, values).startswith("0.50 ")
