"""What `races.py` reports, on kernels that do what they must not."""

from __future__ import annotations

from itertools import product

import pytest
import races
import torch
import triton
import triton.language as tl


@triton.jit
def identity_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def same_element_kernel(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def neighbour_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """Each program reads the element that the next one writes."""
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, tl.load(out_ptr + pid + 1, mask=pid + 1 < tl.num_programs(0), other=0))


@triton.jit
def shift_kernel(x_ptr, out_ptr, N: tl.constexpr, BARRIERS: tl.constexpr):
    """One program moves elements down by one, over what others of its threads read."""
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n + 1, mask=n + 1 < N, other=0)
    if BARRIERS > 0:
        tl.debug_barrier()
    tl.store(x_ptr + n, x)
    if BARRIERS > 1:
        tl.debug_barrier()
    tl.store(out_ptr + n, tl.load(x_ptr + n))


@triton.jit
def twice_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n // 2, n)


@triton.jit
def late_reader_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """All programs read an element, and one of them writes it."""
    pid = tl.program_id(0)
    x = tl.load(out_ptr)
    tl.debug_barrier()
    tl.store(out_ptr + pid, x)


@triton.jit
def far_load_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, tl.load(x_ptr + n + 1))


@triton.jit
def far_store_kernel(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n - 1, n)


SIZE = 8


def run(kernel: triton.JITFunction, grid: int = 1, **constants: int) -> torch.Tensor:
    x, out = torch.arange(SIZE, dtype=torch.int32), torch.zeros(SIZE, dtype=torch.int32)
    kernel[(grid,)](x, out, SIZE // grid, **constants)
    return out


@pytest.mark.parametrize(
    "kernel, grid, constants, what",
    [
        (same_element_kernel, 2, {}, "writes what another program has written"),
        (neighbour_kernel, 4, {}, "(reads|writes) what another program has (written|read)"),
        (late_reader_kernel, 2, {}, "(reads|writes) what another program has (written|read)"),
        (shift_kernel, 1, dict(BARRIERS=0), "writes what the program itself has read, without a barrier"),
        (shift_kernel, 1, dict(BARRIERS=1), "reads what the program itself has written, without a barrier"),
        (twice_kernel, 1, {}, "writes an element twice"),
        (far_load_kernel, 1, {}, r"reads outside of its tensors \(1 elements\)"),
        (far_store_kernel, 1, {}, r"writes outside of its tensors \(1 elements\)"),
    ],
)
def test_hazards_are_reported(kernel: triton.JITFunction, grid: int, constants: dict[str, int], what: str) -> None:
    with pytest.raises(Exception, match=rf"{kernel.__name__}, program \(\d, 0, 0\): .*{what}"):
        run(kernel, grid, **constants)


@pytest.mark.parametrize("grid", [1, 2, 8])
def test_nothing_else_is(grid: int) -> None:
    assert run(identity_kernel, grid).tolist() == list(range(SIZE))
    assert run(shift_kernel, BARRIERS=2).tolist() == [*range(1, SIZE), 0]


@pytest.mark.parametrize("order", races.ORDERS)
def test_programs_run_in_another_order(order: str) -> None:
    """Every one of them once, in an order that is not the grid's and the same in every process."""
    grid = (4, 3, 2)
    plain = list(product(*map(range, grid)))
    found = races.ordered("kernel", grid, order)
    assert found != plain and sorted(found) == plain
    assert found == races.ordered("kernel", grid, order)
    assert order != "reversed" or found == plain[::-1]


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="'sideways', but must be one of random, reversed"):
        races.install("sideways")
