"""Registers, shared memory and spills of every Triton kernel in every configuration, without a GPU.

    python benchmarks/kernel_resources.py                                  # all targets, about 2 minutes
    python benchmarks/kernel_resources.py --targets sm_90 --only attention --output resources.csv

Kernels are compiled for each target and the result is read with the `cuobjdump` that comes with Triton. The exit code
is 1 if any of them has a stack, spills a register, takes more shared memory than the target has, or multiplies with
`wgmma` by 8 columns of TF32, which read shared memory that Triton did not allocate and fail on an H100 as an illegal
memory access (triton-lang/triton#10629). What is compiled is
what the ops launch: `launch` only notes its arguments while the ops run on empty CPU tensors of the cases below, and
Triton's own rules make signatures out of them.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from peft_pte_kernels import ops

KIB = 1024
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Target(NamedTuple):
    gpu: GPUTarget
    shared: int  # bytes that a program may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB),
}
# With Triton 3.6 not all kernels compile for it; 3.7.1, which torch 2.13 brings, and 3.9 do.
OLDEST_TRITON = {"gfx942": Version("3.7")}
Case = tuple[str, Callable[[], Any]]


class Launch(NamedTuple):
    """What an op asked for: a kernel with its arguments and options."""

    case: str
    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


def name_of(*values: Any) -> str:
    return " ".join(str(value).removeprefix("torch.") for value in values)


def encode_cases(encode: Any) -> Iterator[Case]:
    """(dtype, head_dim, rank, layers, update, rotation, keys convolved).

    Update: 0 sum, 1 delta, 2 delta with a gate of writes. Rotation: 0 none, 1 halves, 2 interleaved, 3 a part of the
    head. One key is no convolution.
    """
    settings = [
        *((BF16, 128, rank, 2, delta, 1, 1 + delta) for rank in (32, 64) for delta in (0, 1)),
        *((BF16, 128, 64, 2, delta, 1, 4 - 3 * delta) for delta in (0, 1)),
        *((BF16, 128, 8, 2, 1, 1, 2), (FP32, 128, 64, 2, 1, 1, 4)),
        *((BF16, head_dim, 64, 2, 1, 1, 2) for head_dim in (80, 96)),
        (FP16, 256, 32, 2, 1, 1, 2),
        (FP32, 64, 64, 1, 0, 0, 1),
        (BF16, 128, 16, 1, 1, 2, 1),
        (BF16, 128, 32, 1, 0, 3, 2),
        (FP16, 64, 64, 1, 1, 0, 4),
        *((dtype, 64, rank, 2, 1, 1, 2) for dtype in (BF16, FP32) for rank in (1, 4, 16)),
        (BF16, 128, 48, 2, 1, 1, 2),
        *((BF16, 128, rank, 2, 2, 1, 2) for rank in (1, 8, 32, 48)),
        *((dtype, 128, 64, 2, 2, 1, size) for dtype in (BF16, FP32) for size in (2, 4)),
        (FP32, 64, 32, 1, 2, 0, 1),
    ]
    for dtype, head_dim, rank, layers, delta, rotation, size in settings:

        def run(
            dtype=dtype, head_dim=head_dim, rank=rank, layers=layers, delta=delta, rotation=rotation, size=size
        ):  # fmt: skip
            rows, heads, tokens = (2, 2, 64) if layers > 1 else (1, 1, 1)  # ones are constants to Triton
            keys, values = (
                [torch.empty(rows, heads, tokens, head_dim, dtype=dtype) for _ in range(layers)] for _ in range(2)
            )
            weights = [[torch.empty(rank, heads * head_dim, dtype=dtype) for _ in range(layers)] for _ in range(2)]
            num_taps = size - 1 + (delta == 2)
            taps = [torch.empty(num_taps, rank, dtype=dtype) for _ in range(layers)] if num_taps else []
            cores = torch.empty(layers, rows, rank + size - 1, rank)
            table = torch.empty(rows, tokens, head_dim // (4 if rotation == 3 else 2)) if rotation else None
            valid = torch.ones(rows, tokens, dtype=torch.bool) if rank >= 32 else None
            call = (keys, values, *weights, cores, bool(delta), table, table, rotation == 2, valid, taps)
            encode.encode_cores(*call)
            encode.encode_cores_backward(torch.empty_like(cores), *call, needs_inputs=layers == 2)

        case = f"D={head_dim} r={rank} L={layers} delta={delta} rotation={rotation} c={size}"
        yield name_of(dtype, case), run


def state_cases(state: Any) -> Iterator[Case]:
    for rank, norm, transposed in [
        *((64, norm, False) for norm in ("none", "bound", "row", "frobenius")),
        *((rank, "row", True) for rank in (8, 64)),
        (16, "none", False),
        (32, "frobenius", True),
        *((rank, "bound", True) for rank in (1, 4, 16, 32, 48, 64)),
    ]:

        def run(rank=rank, norm=norm, transposed=transposed):
            cores, query, initial = (
                torch.empty(2, 2, rank + 1, rank)[:, :, :rank],  # with keys for a convolution under them
                torch.empty(2, rank, rank),
                torch.empty(2, 1, rank, rank),
            )
            state.read_states(cores, query, initial, transposed, norm)
            state.read_states_backward(cores, cores, query, initial, transposed, norm)

        yield f"r={rank} norm={norm} transposed={transposed}", run


def cache_cases(cache: Any) -> Iterator[Case]:
    for dtype, head_dim, tensors in [
        *((BF16, head_dim, 4) for head_dim in (64, 80, 96, 128, 256)),
        *((dtype, 512, 4) for dtype in (BF16, FP32)),
        (FP32, 256, 4),
        (BF16, 128, 1),
    ]:

        def run(dtype=dtype, head_dim=head_dim, tensors=tensors):
            cache.compact([torch.empty(2, 2, 128, head_dim, dtype=dtype) for _ in range(tensors)], 5, 30, 100)

        yield name_of(dtype, f"D={head_dim} tensors={tensors}"), run


def low_rank_cases(low_rank: Any) -> Iterator[Case]:
    """(dtype, rank, widths of the projections, rows, tokens): decoding and segments."""
    attention, single, odd, decoding, segment = (2048, 256, 256), (2048,), (2049, 257, 257), (8, 1), (2, 64)
    settings = [
        *(
            (dtype, rank, attention, *size)
            for dtype, rank in ((BF16, 32), (BF16, 64), (FP32, 64))
            for size in (decoding, segment)
        ),
        (BF16, 8, attention, *segment),
        *((dtype, rank, attention, *segment) for dtype in (BF16, FP32) for rank in (1, 4, 16)),
        *((BF16, rank, single, *size) for rank in (1, 8, 16, 48) for size in (decoding, segment)),
        *((BF16, rank, odd, *segment) for rank in (4, 16)),
        (FP32, 16, attention, *decoding),
        (FP16, 32, attention, *segment),
        *((BF16, 32, single, *size) for size in ((1, 1), (128, 1), segment)),
        *((FP32, 64, single, *size) for size in (decoding, segment)),
        *((dtype, 64, odd, *size) for dtype in (BF16, FP32) for size in (decoding, segment)),
        (FP16, 64, odd, 2, 17),
        (FP32, 32, (257,), 2, 1000),
        (BF16, 32, attention, 64, 1),
    ]
    for dtype, rank, widths, rows, tokens in settings:

        def run(dtype=dtype, rank=rank, widths=widths, rows=rows, tokens=tokens):
            x = torch.empty(rows, tokens, 2048, dtype=dtype)
            bases = [torch.empty(rows, tokens, width, dtype=dtype) for width in widths]
            A = [torch.empty(width, rank, dtype=dtype) for width in widths]
            gated = len(widths) == 1  # as at an output projection
            B = [torch.empty(rank, 2048, dtype=dtype) for _ in range(len(widths) + gated)]
            state = torch.empty(rows, rank, rank)
            *outputs, z = low_rank.low_rank(x, bases, state, A, B, 2.0)
            if tokens > 1:
                low_rank.low_rank_backward(outputs, x, z, state, A, B, 2.0, True)

        yield name_of(dtype, f"r={rank} projections={len(widths)} rows={rows} tokens={tokens}"), run


def logprobs_cases(logprobs: Any) -> Iterator[Case]:
    for dtype, vocabulary in [
        *((dtype, 151936) for dtype in (BF16, FP16, FP32)),
        *((dtype, 128257) for dtype in (BF16, FP32)),
        (FP16, 50257),
        (FP32, 100),
    ]:

        def run(dtype=dtype, vocabulary=vocabulary):
            logits, targets = torch.empty(2, 2, vocabulary, dtype=dtype), torch.zeros(2, 2, dtype=torch.int64)
            logprob, _, normalizer = logprobs.logprobs(logits, targets, 0.7)
            logprobs.logprobs_backward(logprob, logits, targets, normalizer, 0.7)

        yield name_of(dtype, f"vocabulary={vocabulary}"), run


def attention_cases(attention: Any) -> Iterator[Case]:
    """(dtype, head_dim, rows, query heads, heads): many splits with one row, one with many rows."""
    settings = [
        *((BF16, head_dim, 1, 16, 2) for head_dim in (64, 80, 128, 256)),
        *((BF16, head_dim, 64, 32, 8) for head_dim in (96, 256)),
        *((dtype, head_dim, 4, 16, 1) for dtype in (BF16, FP32) for head_dim in (192, 512)),
        *((FP32, head_dim, 8, 32, 8) for head_dim in (64, 128, 256)),
        (FP16, 128, 8, 32, 8),
    ]
    for dtype, head_dim, rows, queries, heads in settings:

        def run(dtype=dtype, head_dim=head_dim, rows=rows, queries=queries, heads=heads):
            query = torch.empty(rows, queries, 1, head_dim, dtype=dtype)
            keys, values = torch.empty(2, 1, heads, 1152, head_dim, dtype=dtype).expand(2, rows, heads, 1152, head_dim)
            first, length = torch.zeros(rows, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
            attention.decode_attention(query, keys, values, first, length, 0.1)

        yield name_of(dtype, f"D={head_dim} rows={rows} heads={queries}/{heads}"), run


CASES: dict[str, Callable[[Any], Iterator[Case]]] = {
    "encode": encode_cases,
    "state": state_cases,
    "cache": cache_cases,
    "low_rank": low_rank_cases,
    "logprobs": logprobs_cases,
    "attention": attention_cases,
}


def launches(name: str, backend: str) -> list[Launch]:
    """All launches of the cases of one module of `ops`, on one kind of GPU."""
    module = importlib.import_module(f"{ops.__name__}.{name}")
    noted: list[Launch] = []
    case = ""

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
        noted.append(Launch(case, kernel, args, options))

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "launch", note))
        stack.enter_context(patch.object(torch.version, "hip", "0" if backend == "hip" else None))
        for label, run in CASES[name](module):
            case = label
            run()
    return noted


class Source(NamedTuple):
    """A kernel with a signature, as Triton's JIT would make it of a launch."""

    case: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    @property
    def key(self) -> str:
        return repr((self.kernel.__name__, *self[2:]))


def source_of(launch: Launch, target: GPUTarget) -> Source:
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, options
    )
    return Source(launch.case, kernel, signature, constants, attributes, options)


def nvidia_resources(compiled: Any) -> dict[str, int]:
    """`spills` counts loads and stores of thread-local memory in the machine code, `narrow` products by 8 columns."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def show(option: str) -> str:
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

        usage = show("-res-usage")
        registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
        # Disassembly is slow; a thread that has no memory of its own cannot read or write it.
        spills = len(re.findall(r"\b(?:LDL|STL)\b", show("-sass"))) if stack + local else 0
    narrow = len(re.findall(r"\bwgmma\.mma_async\S*\.m64n8k", compiled.asm["ptx"]))
    return dict(registers=registers, stack=stack + local, spills=spills, narrow=narrow)


def amd_resources(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    spills = value("vgpr_spill_count") + value("sgpr_spill_count")
    return dict(registers=value("vgpr_count"), stack=value("private_segment_fixed_size"), spills=spills, narrow=0)


def compile_source(source: Source, target: str) -> dict[str, Any]:
    """One row of the table."""
    start = time.perf_counter()
    ast = ASTSource(source.kernel, source.signature, source.constants, source.attributes)
    gpu, shared_limit = TARGETS[target]
    row = dict(kernel=source.kernel.__name__, case=source.case, target=target, warps=source.options.num_warps)
    try:
        compiled = triton.compile(ast, target=gpu, options=source.options.__dict__)
    except (triton.CompilationError, RuntimeError) as error:
        print(error, file=sys.stderr)
        nothing = dict.fromkeys(("registers", "stack", "spills", "narrow", "shared"), "")
        return row | nothing | dict(seconds=round(time.perf_counter() - start, 2), ok=False)
    resources = amd_resources(compiled) if gpu.backend == "hip" else nvidia_resources(compiled)
    shared = compiled.metadata.shared
    return row | dict(
        **resources,
        shared=shared,
        seconds=round(time.perf_counter() - start, 2),
        ok=not any(resources[name] for name in ("stack", "spills", "narrow")) and shared <= shared_limit,
    )


def table(names: list[str], targets: list[str]) -> Iterator[dict[str, Any]]:
    for target, name in itertools.product(targets, names):
        gpu = TARGETS[target].gpu
        # What differs in addresses and tensors only is compiled once.
        sources = {(source := source_of(launch, gpu)).key: source for launch in reversed(launches(name, gpu.backend))}
        for source in reversed(sources.values()):
            yield compile_source(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="modules of ops")
    parser.add_argument("--output", type=Path, help="CSV file")
    options = parser.parse_args()
    too_old = [t for t in options.targets if Version(triton.__version__) < OLDEST_TRITON.get(t, Version("0"))]
    if too_old and options.targets != list(TARGETS):
        parser.error(f"Triton {triton.__version__} does not compile for {' '.join(too_old)}: see OLDEST_TRITON")
    for target in too_old:
        print(f"{target:<7} left out: it needs Triton {OLDEST_TRITON[target]}, and this is {triton.__version__}")
        options.targets.remove(target)
    rows = []
    for row in table(options.only, options.targets):
        rows.append(row)
        numbers = "  ".join(
            f"{name} {row[name]}" for name in ("warps", "registers", "shared", "spills", "stack", "narrow")
        )
        verdict = "ok" if row["ok"] else "TOO MUCH"
        print(f"{row['target']:<7} {row['kernel']:<26} {row['case']:<58} {numbers}  {verdict}", flush=True)
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*rows[0], "triton"])
            writer.writeheader()
            writer.writerows(row | dict(triton=triton.__version__) for row in rows)
    print(f"Triton {triton.__version__}; seconds of compiling:")
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        times = [row["seconds"] for row in rows if row["kernel"] == kernel]
        print(f"{kernel:<26} {len(times):>4} times {sum(times):7.1f} s")
    bad = [row for row in rows if not row["ok"]]
    print(f"{len(rows)} compiled, {len(bad)} take too much")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
