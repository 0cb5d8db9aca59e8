"""A pass depends on its inputs alone: not on what else this process has set, nor on whether it was forked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

# Threads of our own kernels in a forked child; 0 in a process that is none.
_kernel_threads = 0
_lock = threading.Lock()
# By kind of device: passes that are running, and what to put back after the last of them.
_running: dict[str, int] = {}
_to_put_back: dict[str, list[Callable[[], None]]] = {}


def num_threads() -> int:
    """Threads of our own kernels: PyTorch's number, in a forked child what it was in its parent."""
    return _kernel_threads or torch.get_num_threads()


def _after_fork() -> None:
    """In a forked child PyTorch's worker threads are gone, and its OpenMP would wait for them for ever: there it
    computes on one thread. Our kernels' pool makes its threads anew."""
    global _kernel_threads, _lock
    _kernel_threads = _kernel_threads or torch.get_num_threads()
    torch.set_num_threads(1)
    _lock = threading.Lock()  # which another thread may have held
    _running.clear()


os.register_at_fork(after_in_child=_after_fork)


def _fp32_products(device: str) -> tuple[Callable[[], Any], Callable[[Any], None], Any]:
    """Whether products of fp32 are fp32 (reading, setting, what is wanted)."""
    if hasattr(torch.backends, "fp32_precision"):  # from PyTorch 2.9 on
        where: Any = torch.backends.cuda.matmul if device == "cuda" else getattr(torch.backends, "mkldnn").matmul  # noqa: B009
        return lambda: where.fp32_precision, lambda value: setattr(where, "fp32_precision", value), ("ieee", "none")
    return torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",)


def _half_sums(device: str) -> list[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """Whether 16-bit products are summed in fp32, parts of them too, which by default a library may add in 16 bit."""
    matmul = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")] if device == "cuda" else []
    if device == "cuda" and hasattr(matmul, "allow_fp16_accumulation"):  # from PyTorch 2.7 on
        names.append("allow_fp16_accumulation")
    return [(partial(getattr, matmul, name), partial(setattr, matmul, name), (False,)) for name in names]


def _enter(device: str) -> None:
    """Set what is global in PyTorch, where it isn't as wanted, for as long as a pass is running."""
    with _lock:
        _running[device] = _running.get(device, 0) + 1
        if _running[device] > 1:
            return
        cuda, restore = torch.backends.cuda, _to_put_back.setdefault(device, [])
        wanted = [_fp32_products(device), *_half_sums(device)] + [
            (getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"), (True,))
            for name in ("flash", "mem_efficient", "math")
        ]
        for read, put, values in wanted:
            found = read()
            if found not in values:
                restore.append(partial(put, found))
                put(values[0])


def _leave(device: str) -> None:
    with _lock:
        _running[device] -= 1
        if not _running[device]:
            restore = _to_put_back.pop(device, [])
            while restore:
                restore.pop()()


@contextmanager
def isolated(device: torch.device, inference: bool = True) -> Iterator[None]:
    """Around every pass: the device is this thread's current one (Triton launches there), no autocast, products of fp32
    in fp32, attention by whichever kernel PyTorch would choose by itself, and with `inference` no record for gradients.

    What is global in PyTorch is changed only where it isn't so, and put back when no pass is running any more.
    """
    _enter(device.type)
    try:
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        mode = torch.inference_mode() if inference else nullcontext()
        with current, mode, torch.autocast(device.type, enabled=False):
            yield
    finally:
        _leave(device.type)
