"""How the benchmarks measure and where results go."""

from __future__ import annotations

import argparse
import csv
import gc
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch

T = TypeVar("T")

# Buffers take turns until they are several times larger than any L2 cache.
ROTATED_BYTES = 256 * 2**20
WARM_UP, CALLS, BURSTS = 3, 20, 10
BURST_SECONDS = 0.05  # fewer calls a burst if they take longer


class Results:
    """A CSV file that grows row by row, so that an interrupted run keeps what it has."""

    def __init__(self, path: Path, about: dict[str, Any]):
        self.path, self.about, self.rows = path, about, []
        self.has_failed = False

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | self.about)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        names = dict.fromkeys(name for row in self.rows for name in row)
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(names))
            writer.writeheader()
            writer.writerows(self.rows)

    def measure(self, row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> bool:
        """Add `row` with what `run` measures, or with its error; returns whether there was none."""
        error = ""
        try:
            row = row | run()
        except torch.cuda.OutOfMemoryError:
            error = "out of memory"
        except Exception as reason:
            traceback.print_exc()
            error = f"{type(reason).__name__}: {str(reason)[:300]}"
            self.has_failed = True
        if error:
            gc.collect()  # not before the exception is gone, which refers to everything
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.add(row | dict(error=error))
        return not error

    def run(self, measure: Callable[[argparse.Namespace, Results], None], options: argparse.Namespace) -> None:
        """A whole part; what fails outside of a single measurement is a row, too."""
        try:
            measure(options, self)
        except Exception as reason:
            traceback.print_exc()
            self.has_failed = True
            self.add(dict(error=f"{type(reason).__name__}: {str(reason)[:300]}"))


class Timing(NamedTuple):
    """Seconds of a call: on the device, with the host well ahead of it, and as called one after the other."""

    device: float
    call: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[int], Any], device: str) -> Timing:
    """Median time of `call(i)`, i counting up so that it can take turns with buffers.

    The host launches a burst while the device sleeps, so that its own time does not show. Where a call has more
    launches than a device queues (about 1000), it shows nevertheless.
    """
    times = []
    for i in range(2 * WARM_UP):
        synchronize(device)
        start = time.perf_counter()
        call(i)
        synchronize(device)
        times.append(time.perf_counter() - start)
    single = statistics.median(times[WARM_UP:])
    if device != "cuda":
        return Timing(single, single)
    count = max(1, min(CALLS, int(BURST_SECONDS / single)))
    bursts, calls = [], []
    for _ in range(BURSTS):
        start = time.perf_counter()
        for i in range(count):
            call(i)
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        calls.append((time.perf_counter() - start) / count)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(min(0.5, 2 * host + 1e-4) * 2e9))  # cycles, at 2 GHz at most
        begin.record()
        for i in range(count):
            call(i)
        end.record()
        torch.cuda.synchronize()
        bursts.append(begin.elapsed_time(end) / 1000 / count)
    return Timing(statistics.median(bursts), statistics.median(calls))


def rotating(make: Callable[[], T], num_bytes: int, device: str) -> list[T]:
    """As many of what `make` makes, `num_bytes` each, as have to take turns."""
    return [make() for _ in range(min(512, math.ceil(ROTATED_BYTES / num_bytes)) if device == "cuda" else 1)]


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a plain copy on the device."""
    size = ROTATED_BYTES if device == "cuda" else 2**20
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda i: target.copy_(source), device).device


class Peak:
    """The most that is allocated on the device inside, beyond what was there before; unknown on the CPU."""

    def __init__(self, device: str):
        self.device = device
        self.bytes: int | str = ""

    def __enter__(self) -> Peak:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self.before


@contextmanager
def plain_torch() -> Iterator[None]:
    """Everything of ours without Triton kernels, as with PTE_KERNELS=torch."""
    with patch("peft_pte_kernels.dispatch.MODE", "torch"):
        yield


def is_out_of_time(options: argparse.Namespace) -> bool:
    """Nothing new is begun then."""
    if time.time() - options.start > options.minutes * 60:
        print("time is up")
        return True
    return False
