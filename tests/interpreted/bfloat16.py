"""Teaches Triton's interpreter bfloat16, which it keeps as bit patterns in uint16 (seen in Triton 3.6 to 3.9).

Without this `tl.dot` multiplies the bit patterns as integers, and float32 is cut off instead of rounded, unnoticed.
`test_interpreter.py` watches whether this is still needed. Other arithmetic on bfloat16 stays wrong in the interpreter
and is refused: kernels raise to float32 first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bit patterns, to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def install() -> None:
    """Patch the interpreter of this process."""
    plain_dot, plain_cast, plain_binary = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.binary_op,
    )
    plain_patch = interpreter._patch_lang_tensor

    def is_bfloat16(handle: TensorHandle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(widen(x.data), tl.float32) if is_bfloat16(x) else x for x in (a, b))
        return plain_dot(self, a, b, d, *rest)

    def cast_impl(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), tl.float32)
        return plain_cast(self, source, target)

    def binary_op(self: Any, left: TensorHandle, right: TensorHandle, op: Any) -> TensorHandle:
        if is_bfloat16(left) or is_bfloat16(right):
            raise TypeError("arithmetic on bfloat16 is wrong in Triton's interpreter; raise to float32 first")
        return plain_binary(self, left, right, op)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        # Triton 3.6 calls int() on an array of one element, which NumPy 2.4 refuses: needed by runtime ranges.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    interpreter._patch_lang_tensor = patch_tensor
