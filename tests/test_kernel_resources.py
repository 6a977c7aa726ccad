"""Triton kernels compile without spills; in processes of their own, without Triton's interpreter."""

from __future__ import annotations

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
OPS = ROOT / "kernels" / "torch-ext" / "peft_pte_kernels" / "ops"
NVIDIA = ["sm_80", "sm_90", "sm_100"]
COMPILED = ["sm_80", "sm_90"]  # all that is compiled here; for the others too: `python benchmarks/kernel_resources.py`

# Rows of a table, checked against a limit of shared memory that nothing but nothing fits into.
NO_SHARED_MEMORY = """
import kernel_resources
kernel_resources.TARGETS["sm_90"] = kernel_resources.TARGETS["sm_90"]._replace(shared=0)
kernel_resources.main()
"""
# 128 x 128 numbers of every thread block of one warp: 512 a thread, which has 255 registers at most.
GREEDY = """
import torch
import triton
import triton.language as tl


@triton.jit
def greedy_kernel(x_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, tl.sum(x, 0)[None, :] + tl.sum(x, 1)[:, None] + x)


def cases(module):
    yield "greedy", lambda: module.launch(
        greedy_kernel, (1,), torch.empty(16384), SIZE=128, device=torch.device("cpu"), num_warps=1
    )


if __name__ == "__main__":
    import kernel_resources

    kernel_resources.CASES = {"logprobs": cases}
    kernel_resources.main()
"""
# Eight warps share a tile of 64 x 16 numbers: by two groups of four, with 8 columns each.
NARROW = """
import torch
import triton
import triton.language as tl


@triton.jit
def narrow_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + row * COLUMNS + column)
    y = tl.load(y_ptr + tl.arange(0, COLUMNS)[:, None] * COLUMNS + column)
    z = tl.dot(x, y, input_precision="tf32x3")
    tl.store(x_ptr + row * COLUMNS + column, tl.dot(z, y, input_precision="tf32x3"))


def cases(module):
    yield "narrow", lambda: module.launch(
        narrow_kernel,
        (1,),
        torch.empty(1024),
        torch.empty(256),
        SIZE=64,
        COLUMNS=16,
        device=torch.device("cpu"),
        num_warps=8,
    )


if __name__ == "__main__":
    import kernel_resources

    kernel_resources.CASES = {"logprobs": cases}
    kernel_resources.main()
"""


def run(*command: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PTE_KERNELS")}
    environment |= dict(
        OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, sys.path)])
    )
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def kernels() -> set[str]:
    """The functions of the package that are compiled by themselves."""
    functions = (
        node
        for path in OPS.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    )
    jitted = [f for f in functions if any(ast.unparse(decorator) == "triton.jit" for decorator in f.decorator_list)]
    return {f.name for f in jitted if f.name.endswith("_kernel")}


def test_no_kernel_spills(tmp_path: Path) -> None:
    done = run("benchmarks/kernel_resources.py", "--targets", *COMPILED, "--output", tmp_path / "table.csv")
    bad = "\n".join(line for line in done.stdout.splitlines() if line.endswith("TOO MUCH"))
    rows = list(csv.DictReader((tmp_path / "table.csv").open())) if (tmp_path / "table.csv").exists() else []
    found = {(row["kernel"], row["target"]) for row in rows}
    assert found == {(k, t) for k in kernels() for t in COMPILED}, done.stderr
    assert done.returncode == 0, bad or done.stderr


def test_gate_fails_on_shared_memory() -> None:
    done = run("-c", NO_SHARED_MEMORY, "--targets", "sm_90", "--only", "logprobs")
    assert done.returncode == 1 and "TOO MUCH" in done.stdout, done.stderr


@pytest.mark.parametrize("target", NVIDIA)
def test_gate_fails_on_a_kernel_that_spills(target: str, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    done = run("greedy.py", "--targets", target, "--output", "table.csv", folder=tmp_path)
    (row,) = csv.DictReader((tmp_path / "table.csv").open())
    assert int(row["spills"]) > 0 and int(row["stack"]) > 0 and row["ok"] == "False"
    assert done.returncode == 1, done.stderr


def test_gate_fails_on_a_product_by_8_columns(tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    done = run("narrow.py", "--targets", "sm_80", "sm_90", "--output", "table.csv", folder=tmp_path)
    rows = {row["target"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert int(rows["sm_90"]["narrow"]) > 0 and rows["sm_90"]["ok"] == "False", done.stderr
    assert int(rows["sm_80"]["narrow"]) == 0 and rows["sm_80"]["ok"] == "True"
    assert done.returncode == 1
