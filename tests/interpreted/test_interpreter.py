"""Triton's interpreter computes bfloat16 right with our help (`bfloat16.py`), and wrong without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import bfloat16
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numerics import poisoned, relative_error

HERE = Path(__file__).parent


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    at = n[:, None] * N + n[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(out_ptr + at, out)


@triton.jit
def copy_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n).to(out_ptr.dtype.element_ty))


@triton.jit
def add_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tl.store(out_ptr + n, x + x)


@triton.jit
def count_kernel(out_ptr, count):
    total = 0
    for i in range(0, count):
        total += i
    tl.store(out_ptr, total)


def run_dot() -> bool:
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, out, 16)
    return relative_error(out, a.double() @ b.double()) < 1e-6


def run_rounding() -> bool:
    x = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-40, 1 + 2**-8])
    x[: len(special)] = special
    out = torch.zeros(1024, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, out, 1024)
    return out.equal(x.bfloat16()) or bool(((out == x.bfloat16()) | (out.isnan() & x.isnan())).all())


def run_widening() -> bool:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.zeros(2**16)
    copy_kernel[(1,)](x, out, 2**16)
    return bool(((out == x.float()) | (out.isnan() & x.isnan())).all())


def run_range() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    count_kernel[(1,)](out, 5)
    return out.item() == 10


CHECKS = {"dot": run_dot, "rounding": run_rounding, "widening": run_widening, "range": run_range}


@pytest.mark.parametrize("name", CHECKS)
def test_interpreter_is_right_with_help(name: str) -> None:
    assert CHECKS[name]()


@pytest.mark.parametrize("name", ["dot", "rounding"])
def test_help_is_still_needed(name: str) -> None:
    code = f"import test_interpreter; print(test_interpreter.CHECKS[{name!r}]())"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=HERE, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False", (
        f"Triton {triton.__version__} with NumPy {np.__version__} computes bfloat16 {name} right by itself: remove "
        "that part of tests/interpreted/bfloat16.py, or limit it to older versions."
    )


def test_other_arithmetic_is_refused() -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="raise to float32 first"):
        add_kernel[(1,)](x, torch.empty_like(x), 16)


def test_rounding_by_itself() -> None:
    """All bit patterns survive a round trip."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = bfloat16.widen(bits)
    number = ~np.isnan(values)
    assert (bfloat16.narrow(values)[number] == bits[number]).all()


def test_poisoned_memory() -> None:
    with poisoned():
        x = torch.zeros(3)
        assert all(y.isnan().all() for y in (torch.empty(3), torch.empty_like(x), x.new_empty(2)))
        assert torch.empty(2, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()
    assert torch.empty_like.__name__ == "empty_like"
