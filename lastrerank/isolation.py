"""A pass depends on its inputs alone: not on what else this process has set, nor on whether it was forked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

_PROCESS = os.getpid()
_kernel_threads = 0  # of a forked child


def num_threads() -> int:
    """Threads of our own kernels: PyTorch's number, in a forked child what it was when the child began."""
    if os.getpid() == _PROCESS:
        return torch.get_num_threads()
    _leave_torch_threads()
    return _kernel_threads


def _leave_torch_threads() -> None:
    """In a forked child PyTorch's worker threads are gone, and its OpenMP would wait for them for ever: from here on it
    computes on one thread there. Our kernels' pool makes its threads anew."""
    global _kernel_threads
    if torch.get_num_threads() > 1 or not _kernel_threads:
        _kernel_threads = torch.get_num_threads()
        torch.set_num_threads(1)


def _fp32_products(device: str) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
    """Whether products of fp32 are fp32 (reading, setting, what is wanted)."""
    if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on
        where: Any = torch.backends.cuda.matmul if device == "cuda" else getattr(torch.backends, "mkldnn").matmul  # noqa: B009
        return lambda: where.fp32_precision, lambda value: setattr(where, "fp32_precision", value), ("ieee", "none")
    return torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",)


@contextmanager
def isolated(device: torch.device, inference: bool = True) -> Iterator[None]:
    """Around every pass: the device is this thread's current one (Triton launches there), no autocast, products of fp32
    in fp32, attention by whichever kernel PyTorch would choose by itself, one PyTorch thread in a forked child, and
    with `inference` no record for gradients.

    What is global in PyTorch is changed only where it isn't so, and put back.
    """
    if os.getpid() != _PROCESS:
        _leave_torch_threads()
    cuda = torch.backends.cuda
    wanted = [_fp32_products(device.type)] + [
        (getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"), (True,))
        for name in ("flash", "mem_efficient", "math")
    ]
    changed = []
    try:
        for read, put, values in wanted:
            found = read()
            if found not in values:
                changed.append((put, found))
                put(values[0])
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        mode = torch.inference_mode() if inference else nullcontext()
        with current, mode, torch.autocast(device.type, enabled=False):
            yield
    finally:
        for put, found in reversed(changed):
            put(found)
