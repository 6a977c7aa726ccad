"""Which implementation runs (Triton or PyTorch), how kernels are launched, and how ops are registered.

The environment variable `PTE_KERNELS`, read when the package is imported, chooses:
`auto` (default) takes Triton for tensors on a GPU and PyTorch otherwise; `triton` always takes Triton, and refuses what
it cannot do (on the CPU it needs Triton's interpreter, `TRITON_INTERPRET=1`); `torch` always takes PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix, ops

CHOICES = ("auto", "triton", "torch")
MODE = os.environ.get("PTE_KERNELS", "auto")
if MODE not in CHOICES:
    raise ImportError(f"The environment variable PTE_KERNELS is {MODE!r}, but must be one of {', '.join(CHOICES)}.")

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The largest rank whose tiles fit into registers on every target (benchmarks/kernel_resources.py).
MAX_RANK = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(*tensors: torch.Tensor, rank: int = 1) -> str | None:
    """Why Triton cannot be used for these tensors, None if it can."""
    if not HAS_TRITON:
        return "the package `triton` is not installed"
    for tensor in tensors:
        if not tensor.is_cuda and not INTERPRETED:
            return f"a tensor is on {tensor.device} and TRITON_INTERPRET=1 is not set"
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}; float32, bfloat16 and float16 are supported"
    if rank > MAX_RANK:
        return f"the rank is {rank}; up to {MAX_RANK} is supported"
    return None


def may_use_triton(tensor: torch.Tensor) -> bool:
    """Whether `PTE_KERNELS` lets Triton kernels run where this tensor is."""
    return MODE != "torch" and (MODE == "triton" or tensor.is_cuda)


def uses_triton(*tensors: torch.Tensor, rank: int = 1) -> bool:
    """Whether Triton kernels run on these floating-point tensors.

    Raises:
        ValueError: `PTE_KERNELS=triton` asks for what Triton cannot do.
    """
    if not may_use_triton(tensors[0]):
        return False
    reason = obstacle(*tensors, rank=rank)
    if reason is not None and MODE == "triton":
        raise ValueError(
            f"PTE_KERNELS=triton was asked for, but {reason}. Set PTE_KERNELS=auto to use PyTorch where Triton cannot "
            "be used."
        )
    return reason is None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, device: torch.device, **options: Any) -> None:
    """Launch a Triton kernel on `device`, which need not be the current one (models spread over several GPUs).

    The only place where kernels are launched: benchmarks/kernel_resources.py replaces it to learn every signature.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **options)
    else:
        kernel[grid](*args, **options)


def precision() -> str:
    """How `tl.dot` multiplies float32 operands: in three TF32 passes, exact to about 2**-22, or as they are on AMD.

    Three passes on tensor cores need far fewer registers than float32 arithmetic outside of them.
    """
    return "ieee" if torch.version.hip else "tf32x3"


def limits() -> dict[str, int]:
    """Launch options by which a kernel may have all registers that there are.

    Left to itself ptxas stops at round numbers for the sake of occupancy, and spills a few. AMD has no such option.
    """
    return {} if torch.version.hip else dict(maxnreg=255)


def tile(size: int) -> int:
    """The edge of a tile that holds `size` elements: a power of two, 16 at least, as `tl.dot` wants."""
    return max(16, 1 << (size - 1).bit_length())


def num_warps(rank: int) -> int:
    """Warps of a program that multiplies tiles of 64 tokens by a tile as wide as the rank: eight, but for 16 columns.

    Eight would share those as 8 and 8, and Hopper's products by 8 columns of TF32 read past what Triton allocates: an
    illegal memory access on an H100 (triton-lang/triton#10629). benchmarks/kernel_resources.py finds them offline.
    """
    return 8 if tile(rank) > 16 else 4


def can_skip_dispatcher() -> bool:
    """Whether a registered op may be called as the function that it is, which saves half of the host's time for it.

    Not where autograd, the compiler or a dispatch mode (fake tensors, counters) has to see it.
    """
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack())


_library = torch.library.Library(add_op_namespace_prefix("").removesuffix("::"), "FRAGMENT")


def register(
    function: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates: tuple[str, ...] = (),
) -> Any:
    """Register `function` under its name, so that `torch.compile` sees one node.

    `fake` gives outputs without values; `setup_context` and `backward` as `torch.library.register_autograd`. Through
    `Library.define` and `impl`, which cost less per call than `torch.library.custom_op`.
    """
    name = function.__name__
    _library.define(name + torch.library.infer_schema(function, mutates_args=mutates))
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            add_op_namespace_prefix(name), backward, setup_context=setup_context, lib=_library
        )
    return getattr(ops, name).default
