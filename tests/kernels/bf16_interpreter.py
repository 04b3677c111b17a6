"""bf16 in Triton's interpreter as on a GPU: casts round to nearest even, arithmetic happens on the numbers.

The interpreter keeps bf16 as uint16; its casts truncate, and its arithmetic adds up the bit patterns.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Replace casts and arithmetic of the interpreter in this process."""
    cast, binary = InterpreterBuilder.cast_impl, InterpreterBuilder.binary_op

    def cast_impl(self, source, to):
        if tl.bfloat16 in (source.dtype.scalar, to.scalar) and source.dtype.scalar != to.scalar:
            return TensorHandle(_cast(source, to.scalar), to.scalar)
        return cast(self, source, to)

    def binary_op(self, left, right, operation):
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, operation)
        result = operation(_numbers(left), _numbers(right))
        if result.dtype == bool:
            return TensorHandle(result, tl.bfloat16)
        return TensorHandle(_bits(result), tl.bfloat16)

    fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self, source, to, rounding_mode):
        if tl.bfloat16 in (source.dtype.scalar, to.scalar):
            return cast_impl(self, source, to)
        return fp_to_fp(self, source, to, rounding_mode)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


def _numbers(handle) -> np.ndarray:
    """fp32 values of a bf16 tensor of the interpreter."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _bits(numbers: np.ndarray) -> np.ndarray:
    """fp32 values rounded to bf16, as uint16."""
    numbers = np.ascontiguousarray(numbers, dtype=np.float32)
    return torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy().reshape(numbers.shape)


def _cast(source, to) -> np.ndarray:
    if to == tl.bfloat16:
        return _bits(source.data.astype(np.float32))
    numbers = _numbers(source)
    return numbers.astype(np.dtype(to.name.replace("fp", "float"))) if to.is_floating() else numbers.astype(to.name)
