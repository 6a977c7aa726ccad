"""Triton's interpreter as a strict judge: programs in another order, no races, no access outside of memory.

The interpreter runs programs one after the other as the grid counts them, and so hides all that depends on their order.
Here they run in a random order (of kernel and grid, the same in every run) or in reversed order, and every load and
store of a launch is checked against those before it. What fails a test, as the error of a launch:

- a program reads or writes an element that another program writes;
- a program reads an element that it has written, or writes one that it has read or written, without
  `tl.debug_barrier()` in between: the threads of a program wait for each other there only;
- a store writes an element twice;
- a load or store reaches outside of the tensors that the kernel got, or whose addresses are in a table that it got.

Elements are known by their first byte, so a kernel must read and write a tensor in elements of one size. Atomic
operations, which no kernel uses, are not seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

ORDERS = ("random", "reversed")


class Hazard(Exception):
    """A kernel does what has no defined result on a GPU."""


class Watch:
    """What the programs of a launch have read and written so far.

    Time is counted in phases: a new one begins with every launch, program and barrier. What is older than the launch
    counts as nothing, so that the arrays below need not be cleared.
    """

    def __init__(self) -> None:
        self.phase = 0
        # Of every place the phase of its last write, of its first and of its last read.
        self.written = self.first_read = self.last_read = np.zeros(0, dtype=np.int64)

    def begin_launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        storages = sorted({(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors})
        starts, sizes = np.array([storage for storage in storages if storage[1]], dtype=np.int64).reshape(-1, 2).T
        self.starts, self.ends = starts, starts + sizes
        self.shifts = np.cumsum(sizes) - sizes - starts  # from an address to a place in the arrays
        if sizes.sum() > self.written.size:
            self.written, self.first_read, self.last_read = np.zeros((3, 2 * sizes.sum()), dtype=np.int64)
        self.phase += 1
        self.kernel, self.launch = kernel, self.phase

    def begin_program(self, program: tuple[int, ...]) -> None:
        self.phase += 1
        self.index, self.program = program, self.phase

    def barrier(self) -> None:
        self.phase += 1

    def refuse(self, found: np.ndarray, what: str) -> None:
        if found.any():
            raise Hazard(f"{self.kernel}, program {self.index}: {what} ({int(found.sum())} elements)")

    def check(self, phases: np.ndarray, action: str, earlier: str) -> None:
        """Refuse elements whose last access was in another program, or in this one since the last barrier."""
        self.refuse((phases > self.launch) & (phases < self.program), f"{action} what another program {earlier}")
        self.refuse(phases == self.phase, f"{action} what the program itself {earlier}, without a barrier in between")

    def places(self, pointers: TensorHandle, mask: TensorHandle, action: str) -> np.ndarray:
        """The places of the elements that a load or store touches."""
        addresses = pointers.data[mask.data].view(np.int64)
        if not addresses.size:
            return addresses
        storages = np.searchsorted(self.starts, addresses, side="right") - 1
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = (storages >= 0) & (addresses + size <= self.ends[storages])
        self.refuse(~inside, f"{action} outside of its tensors")
        return addresses + self.shifts[storages]

    def load(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        places = self.places(pointers, mask, "reads")
        self.check(self.written[places], "reads", "has written")
        first = self.first_read[places]
        self.first_read[places] = np.where(first > self.launch, first, self.phase)
        self.last_read[places] = self.phase

    def store(self, pointers: TensorHandle, mask: TensorHandle) -> None:
        places = self.places(pointers, mask, "writes")
        self.check(self.written[places], "writes", "has written")
        self.check(self.last_read[places], "writes", "has read")
        first = self.first_read[places]  # the last read may be this program's own
        self.refuse((first > self.launch) & (first < self.program), "writes what another program has read")
        lanes = -np.arange(places.size)  # no phase is below one
        self.written[places] = lanes
        self.refuse(self.written[places] != lanes, "one store writes an element twice")
        self.written[places] = self.phase


def ordered(kernel: str, grid: tuple[int, ...], order: str) -> list[tuple[int, ...]]:
    """All programs of a grid, in the order in which they run."""
    programs = list(itertools.product(*map(range, grid)))
    if order == "random":
        random.Random(f"{kernel} {grid}").shuffle(programs)
    else:
        programs.reverse()
    return programs


def install(order: str) -> None:
    """Patch the interpreter of this process."""
    if order not in ORDERS:
        raise ValueError(f"The order of programs is {order!r}, but must be one of {', '.join(ORDERS)}.")
    from peft_pte_kernels.ops import cache, encode

    plain_call, plain_addresses = GridExecutor.__call__, encode.addresses
    plain_dim, plain_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    plain_load, plain_store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    plain_barrier = InterpreterBuilder.create_barrier
    watch = Watch()
    programs: Iterator[tuple[int, ...]] = iter(())

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        targets = [target for x in tensors for target in getattr(x, "targets", ())]
        watch.begin_launch(self.fn.__name__, tensors + targets)
        plain_call(self, *args, **kwargs)

    def addresses(*columns: list[torch.Tensor]) -> torch.Tensor:
        table = plain_addresses(*columns)
        if len(columns[0]) > 1:
            table.targets = [x for column in columns for x in column]
        return table

    def set_grid_dim(self: Any, *grid: int) -> None:
        nonlocal programs
        plain_dim(self, *grid)
        programs = iter(ordered(watch.kernel, grid, order))

    def set_grid_idx(self: Any, *_: int) -> None:
        program = next(programs)
        plain_index(self, *program)
        watch.begin_program(program)

    def load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any) -> TensorHandle:
        watch.load(pointers, mask)
        return plain_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> None:
        watch.store(pointers, mask)
        return plain_store(self, pointers, value, mask, *rest)

    def barrier(self: Any) -> None:
        watch.barrier()
        return plain_barrier(self)

    GridExecutor.__call__ = call
    encode.addresses = cache.addresses = addresses
    InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx = set_grid_dim, set_grid_idx
    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
    InterpreterBuilder.create_barrier = barrier
