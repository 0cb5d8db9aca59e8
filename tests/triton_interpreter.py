"""Repairs of the interpreter of Triton 3.6 and 3.7, so that its faults aren't taken for a kernel's.

- casts from fp32 to bf16 and to float8 e4m3 truncate; hardware rounds to nearest even
- `tl.dot` on bf16 multiplies the bit patterns
- loop bounds that are tensors fail with numpy >= 2.4 (one-element arrays no longer convert to int)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair() -> None:
    original = interpreter._convert_float

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.bfloat16 and target == tl.float32:
            return _bf16_values(data.view(np.uint16))
        if source == tl.float32 and target == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(data, np.float32)).bfloat16()
            return values.view(torch.uint16).numpy()
        if source == tl.float32 and target == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(data, np.float32)).to(torch.float8_e4m3fn)
            return values.view(torch.uint8).numpy()
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float

    builder = interpreter.InterpreterBuilder
    original_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_bf16_values(x.data), tl.float32) for x in (a, b))
        return original_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.create_dot = create_dot

    original_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor
