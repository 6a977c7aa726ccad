"""Processes that tests start: forked from a server that has imported the libraries, and killed if they take long."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = 120  # seconds for the processes of one test; they need a few


def start(target: Callable[..., None], *args: Any) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "peft", "transformers.trainer", "torch._dynamo"])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def run_group(world: int, target: Callable[..., None], folder: Path, *args: Any) -> None:
    """`target(rank, world, folder, *args)` for each rank. Fails with their output if one fails or takes too long."""
    processes = [start(target, rank, world, folder, *args) for rank in range(world)]
    deadline = time.monotonic() + TIMEOUT
    while True:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    if any(code != 0 for code in codes):
        outputs = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("output-*.txt")))
        pytest.fail(f"exit codes {codes} (None: it was still running, for up to {TIMEOUT} seconds)\n{outputs}")


@contextmanager
def group(rank: int, world: int, folder: Path) -> Iterator[None]:
    """In a process: be one of the group, on one thread. Output goes to a file, with a trace if it takes too long."""
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(TIMEOUT - 5, file=2)
    torch.set_num_threads(1)
    environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, OMP_NUM_THREADS=1)
    os.environ.update({name: str(value) for name, value in environment.items()})
    if "lo" in (name for _, name in socket.if_nameindex()):  # else gloo looks up the name of the host
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT), rank=rank, world_size=world)
    yield
    # Not `destroy_process_group`, in which gloo hangs now and then; but nobody hangs up before all are done.
    (folder / f"done-{rank}").touch()
    while len(list(folder.glob("done-*"))) < world:
        time.sleep(0.01)
    sys.stdout.flush()
    os._exit(0)
