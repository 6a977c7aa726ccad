"""How kernels are compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

# Largest relative error of a kernel's result, by the dtype in which it is stored: half the spacing of numbers, or the
# rounding of float32 sums.
LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}

ALLOCATIONS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square of the difference over that of `expected` (float64); absolute if `expected` is all zero.

    Raises:
        ValueError: shapes differ. NaN anywhere in `actual` gives NaN, which is within no limit.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if not actual.numel():
        return 0.0
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    size = expected.double().square().mean().sqrt()
    return (difference / size if size > 0 else difference).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory is full of NaN (integers: their largest value), so that an element no kernel wrote is noticed."""

    def filled(allocate: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype != torch.bool and not tensor.is_complex():
                    tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return wrapper

    with ExitStack() as stack:
        for owner, name in ALLOCATIONS:
            stack.enter_context(patch.object(owner, name, filled(getattr(owner, name))))
        yield


def compare(
    kernel: Callable[..., list[torch.Tensor]],
    reference: Callable[..., list[torch.Tensor]],
    tensors: list[torch.Tensor],
    limit: float,
    seed: int = 0,
) -> None:
    """Results and all gradients of `kernel` against those of `reference` in float64 on the same numbers.

    A gradient is measured against its own size, or a tenth of what came in from above if it is smaller than that: the
    gradient of a core that was overwritten is the small remainder of cancelling numbers.
    """
    low = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    high = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors]
    with poisoned():
        actual = kernel(*low)
    expected = reference(*high)
    generator = torch.Generator().manual_seed(seed)
    above = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in actual]
    for x, y in zip(actual, expected, strict=True):
        error = relative_error(x, y)
        assert error <= limit, f"{error:.2e} for the result {tuple(x.shape)}"
    low, high = ([x for x in inputs if x.requires_grad] for inputs in (low, high))
    with poisoned():
        gradients = torch.autograd.grad(actual, low, above)
    floor = 0.1 * torch.cat([x.flatten() for x in above]).double().square().mean().sqrt()
    for got, x, wanted in zip(gradients, low, torch.autograd.grad(expected, high, [x.double() for x in above])):
        assert got.dtype == x.dtype and got.shape == x.shape
        size = wanted.square().mean().sqrt()
        error = relative_error(got, wanted) * (min(1.0, (size / floor).item()) if size > 0 else 1.0)
        assert error <= limit, f"{error:.2e} for the gradient of {tuple(x.shape)}"
