"""Time of the kernels by themselves, on shapes of real models."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import memory
import torch
import torch.nn.functional as F
from measuring import Peak, Results, copy_bandwidth, is_out_of_time, plain_torch, rotating, timed

import peft_pte_kernels
from peft_pte_kernels import Rotation, reference

RANK = 32
Call = Callable[[int], Any]


class Sizes(NamedTuple):
    """What the kernels see of a model."""

    layers: int
    heads: int
    head_dim: int
    hidden: int
    outputs: tuple[int, ...]  # of the query, key and value projections

    @classmethod
    def of(cls, shape: str) -> Sizes:
        with torch.device("meta"):
            config = memory.SHAPES[shape]()
        head_dim = config.hidden_size // config.num_attention_heads
        outputs = tuple(n * head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2))
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, config.hidden_size, outputs)


def dtype_of(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 2)


# ------------------------------------------------------------------------------------------------------------ encoding


def encode_calls(sizes: Sizes, batch: int, tokens: int, device: str) -> tuple[dict[tuple[str, str], Call], int]:
    """Encodings of the whole model by (update rule, implementation), and the bytes of K and V that one reads.

    As by default, the delta rule convolves keys.
    """
    dtype = dtype_of(device)
    num_bytes = 2 * sizes.layers * batch * sizes.heads * tokens * sizes.head_dim * dtype.itemsize
    width = sizes.heads * sizes.head_dim

    def slots() -> list[torch.Tensor]:
        """Of each layer the part of the slots that leaves, where it lies."""
        shape = batch, sizes.heads, 2 * tokens, sizes.head_dim
        return [torch.randn(shape, device=device, dtype=dtype)[:, :, :tokens] for _ in range(sizes.layers)]

    copies = rotating(lambda: (slots(), slots()), num_bytes, device)
    weights = [
        [torch.randn(RANK, width, device=device, dtype=dtype) * width**-0.5 for _ in range(sizes.layers)]
        for _ in range(2)
    ]
    carried = {"sum": (None, 0), "delta": ([torch.ones(1, RANK, device=device, dtype=dtype)] * sizes.layers, 1)}
    angles = torch.rand(1, tokens, sizes.head_dim // 2, device=device).expand(batch, -1, -1)
    rotation = Rotation(angles.cos(), angles.sin(), False)

    def call(encode: Callable[..., torch.Tensor], update: str) -> Call:
        taps, rows = carried[update]
        cores = torch.zeros(sizes.layers, batch, RANK + rows, RANK, device=device)
        return lambda i: encode(*copies[i % len(copies)], *weights, cores, update, rotation, None, taps)

    functions = {"kernel": peft_pte_kernels.encode, "PyTorch": reference.encode}
    calls = {(update, name): call(f, update) for update in ("sum", "delta") for name, f in functions.items()}
    return calls, num_bytes


def measure_encode(options: argparse.Namespace, results: Results) -> None:
    """A quarter of a window of 1024 leaves. Bandwidth is that of keys and values, which are read once."""
    device = options.device
    tokens, batches = (256, (1, 8, 64)) if device == "cuda" else (16, (1, 2))
    copied = copy_bandwidth(device)
    for shape in options.shapes:
        for batch in batches:
            if is_out_of_time(options):
                return
            calls, num_bytes = encode_calls(Sizes.of(shape), batch, tokens, device)

            def run(call: Call, num_bytes: int = num_bytes) -> dict[str, Any]:
                with torch.no_grad(), Peak(device) as peak:
                    timing = timed(call, device)
                return dict(
                    device_us=microseconds(timing.device),
                    call_us=microseconds(timing.call),
                    kv_bytes=num_bytes,
                    gb_per_s=round(num_bytes / timing.device / 1e9, 1),
                    copy_gb_per_s=round(copied / 1e9, 1),
                    share_of_copy=round(num_bytes / timing.device / copied, 4),
                    peak_bytes=peak.bytes,
                )

            for (update, implementation), call in calls.items():
                row = dict(shape=shape, batch=batch, tokens=tokens, update=update, implementation=implementation)
                results.measure(row, functools.partial(run, call))


# ------------------------------------------------------------------------------------------------- the low-rank update


class Projections(NamedTuple):
    """One attention layer's inputs and adapter weights: q, k and v of one input, and o.

    PTE asks with the input of the module at o too, and has a gate there.
    """

    x: torch.Tensor
    attended: torch.Tensor
    bases: list[torch.Tensor]  # W x of q, k, v and o
    state: torch.Tensor
    A: list[torch.Tensor]
    B: list[torch.Tensor]  # of LoRA
    asked: list[torch.Tensor]  # B and G of PTE at o

    @classmethod
    def random(cls, sizes: Sizes, batch: int, tokens: int, device: str, gradient: bool) -> Projections:
        dtype = dtype_of(device)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(gradient)

        outputs, inputs = (*sizes.outputs, sizes.hidden), (*[sizes.hidden] * 3, sizes.outputs[0])
        return cls(
            normal(batch, tokens, sizes.hidden),
            normal(batch, tokens, sizes.outputs[0]),
            [normal(batch, tokens, size) for size in outputs],
            normal(batch, RANK, RANK, scale=RANK**-0.5, dtype=torch.float32),
            [normal(size, RANK) for size in outputs],
            [normal(RANK, size, scale=size**-0.5) for size in inputs],
            [normal(RANK, sizes.hidden, scale=sizes.hidden**-0.5) for _ in range(2)],
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.x, self.attended, *self.bases, self.state, *self.A, *self.B, *self.asked]

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


def pte_update(p: Projections) -> list[torch.Tensor]:
    first = peft_pte_kernels.low_rank_update(p.x, p.bases[:3], p.state, p.A[:3], p.B[:3], 1.0)
    B, gate = p.asked
    return [*first, *peft_pte_kernels.low_rank_update(p.x, p.bases[3:], p.state, p.A[3:], [B], 1.0, gate)]


def lora_update(p: Projections) -> list[torch.Tensor]:
    """What PEFT's LoRA layer does: two linear maps, a scaling and an addition for each projection."""
    inputs = (*[p.x] * 3, p.attended)
    return [base + F.linear(F.linear(x, B), A) * 1.0 for x, base, A, B in zip(inputs, p.bases, p.A, p.B)]


APPLY_ARMS = {
    "PTE, kernels": (pte_update, False),
    "PTE, PyTorch": (pte_update, True),
    "LoRA": (lora_update, False),
}


def apply_calls(copies: list[Projections], update: Callable[..., list[torch.Tensor]]) -> dict[str, Call]:
    """Forward, and forward and backward together, which only training has."""

    def forward(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return update(copies[i % len(copies)])

    def both(i: int) -> None:
        p = copies[i % len(copies)]
        # The state takes no part in LoRA; its gradient is one of PTE's costs.
        torch.autograd.grad(update(p), p.tensors, p.bases, allow_unused=True)

    return {"forward": forward, "forward and backward": both} if copies[0].x.requires_grad else {"forward": forward}


def measure_apply(options: argparse.Namespace, results: Results) -> None:
    """The update of all four projections of one layer, in decoding and on a segment in training."""
    device = options.device
    for shape in options.shapes:
        sizes = Sizes.of(shape)
        for batch, tokens in [(1, 1), (16, 1), (64, 1), (8, 1024 if device == "cuda" else 32)]:
            make = functools.partial(Projections.random, sizes, batch, tokens, device, tokens > 1)
            copies = rotating(make, make().num_bytes, device)
            for arm, (update, is_plain) in APPLY_ARMS.items():
                for direction, call in apply_calls(copies, update).items():
                    if is_out_of_time(options):
                        return

                    def run(call: Call = call, is_plain: bool = is_plain) -> dict[str, Any]:
                        with plain_torch() if is_plain else nullcontext(), Peak(device) as peak:
                            timing = timed(call, device)
                        times = dict(device_us=microseconds(timing.device), call_us=microseconds(timing.call))
                        return times | dict(peak_bytes=peak.bytes)

                    results.measure(dict(shape=shape, batch=batch, tokens=tokens, arm=arm, direction=direction), run)
