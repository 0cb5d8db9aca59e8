"""The operations on a CPU by the C++ kernels of `csrc/`, through a plain C interface.

fp32 activations between operations, and one of three precisions of what is multiplied in them:

- float32: numbers as they are; on AMX, where weights are bf16 numbers, as three bf16 numbers each, which is as exact.
- bfloat16: weights are stored in bf16, and what they multiply is rounded to bf16 (to nearest, ties to even) as it comes
  in; likewise queries, keys, values and softmax's weights in attention. Products are exact, sums in fp32. What is
  rounded is the same on every processor: one with units for bf16 multiplies faster, any other needs half the memory all
  the same.
- int8: weights 7 bits and symmetric per output, activations 8 bits and symmetric per row, both rotated first
  (`lastrerank.rotation`), so that none is far larger than the others; integer accumulation. In attention integers of 8
  bits, rotated likewise, symmetric per row and head, softmax's weights per row and tile of 256 keys; of 16 bits where
  the processor has no units for 8 (VNNI, Arm's dot product): no more multiplications there. On AMX attention is that of
  bfloat16.

What the kernels don't do better than PyTorch is inherited: `embed`, and the readouts, which are 0.1 % of a pass.

`LASTRERANK_ISA` forces an instruction set for tests and measurements: portable, avx2, avx512, avx512vnni, avx512bf16 or
amx, on Arm portable, dotprod or armv86.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lastrerank.config import MOST_ROTATED
from lastrerank.isolation import num_threads
from lastrerank.ops import Prefixes, Weight
from lastrerank.ops.reference import ReferenceOperations
from lastrerank.ops.shapes import (
    check_attention,
    check_linear,
    check_logit,
    check_qk_norm_rope,
    check_rms_norm,
    check_swiglu,
    check_weight,
)

_VERSION = 11
# What attention multiplies (Precision of kernels.h), by the dtype that was asked for.
_PRECISIONS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_B, _I, _L, _F, _P = ctypes.c_bool, ctypes.c_int, ctypes.c_long, ctypes.c_float, ctypes.c_void_p


class _Kernels(ctypes.Structure):
    """The table of kernels.h, field by field."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("widened_is_faster", _B),
        ("int8_attention", ctypes.c_char_p),
        ("panel", _I),
        ("packed_f32_size", ctypes.CFUNCTYPE(_L, _L, _L)),
        ("packed_bf16_size", ctypes.CFUNCTYPE(_L, _L, _L)),
        ("packed_i8_size", ctypes.CFUNCTYPE(_L, _L, _L)),
        ("pack_f32", ctypes.CFUNCTYPE(None, _P, _B, _L, _L, _P)),
        ("unpack_f32", ctypes.CFUNCTYPE(None, _P, _L, _L, _P)),
        ("pack_bf16", ctypes.CFUNCTYPE(None, _P, _B, _L, _L, _P)),
        ("unpack_bf16", ctypes.CFUNCTYPE(None, _P, _L, _L, _P)),
        ("pack_i8", ctypes.CFUNCTYPE(_I, _P, _B, _L, _L, _B, _P, _P, _P)),
        ("unpack_i8", ctypes.CFUNCTYPE(None, _P, _P, _L, _L, _P)),
        ("linear_f32", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _P, _L, _P, _B, _P, _L)),
        ("linear_bf16", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _P, _L, _P, _B, _P, _L)),
        ("linear_widened", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _P, _L, _P, _B, _P, _L)),
        ("linear_i8", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _P, _P, _P, _L, _P, _B, _P, _L)),
        ("add_rms_norm", ctypes.CFUNCTYPE(_I, _I, _P, _L, _P, _L, _P, _F, _L, _L, _P, _L)),
        ("swiglu", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _P, _L)),
        ("qk_norm_rope", ctypes.CFUNCTYPE(_I, _I, _P, _L, _L, _L, _L, _L, _P, _P, _P, _P, _P, _F)),
        (
            "attention",
            ctypes.CFUNCTYPE(
                _I, _I, _I, _P, _L, _L, _P, _P, _L, _P, _L, _L, _P, _P, _L, _L, _L, _L, _L, _F, _P, _L
            ),
        ),
    )


def instruction_sets() -> list[str]:
    """Names of the instruction sets that the library has and this processor runs, best first.

    Raises:
        RuntimeError: the library isn't there or is of another version; the message says why.
    """
    return [kernels.name.decode() for kernels in _tables()]


@lru_cache(maxsize=1)
def _tables() -> list[Any]:
    # Beside this file, or where an editable install put it.
    import lastrerank.ops

    candidates = [Path(folder) / "lastrerank_native.so" for folder in lastrerank.ops.__path__]
    candidates += [path.with_suffix(suffix) for path in candidates for suffix in (".dylib", ".dll")]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise RuntimeError("its library was not built: no working C++ compiler when lastrerank was installed")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"its library does not load: {error}") from error
    if library.lastrerank_version() != _VERSION:
        raise RuntimeError(f"{path} is of version {library.lastrerank_version()}, expected {_VERSION}: reinstall")
    get = library.lastrerank_kernels
    get.argtypes, get.restype = [_I], ctypes.POINTER(_Kernels)
    tables: list[Any] = []
    while pointer := get(len(tables)):
        tables.append(pointer.contents)
    return tables


class NativeOperations(ReferenceOperations):
    """See `lastrerank.ops.Operations`. fp32 tensors on the CPU whose rows are contiguous; grad must be disabled.

    Args:
        dtype: of what is multiplied: float32, bfloat16 or int8.

    Raises:
        RuntimeError: the library is missing, or the instruction set forced by LASTRERANK_ISA doesn't run here.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        forced = os.environ.get("LASTRERANK_ISA")
        tables = {table.name.decode(): table for table in _tables()}
        if forced is not None and forced not in tables:
            raise RuntimeError(f"LASTRERANK_ISA is {forced!r}, this processor and library have {list(tables)}")
        self.kernels = tables[forced] if forced is not None else next(iter(tables.values()))
        self.dtype = dtype
        self._precision = _PRECISIONS[dtype]
        if dtype == torch.int8:
            self.rounding = f"rotated by {MOST_ROTATED}, attention {self.kernels.int8_attention.decode()}"
        elif dtype == torch.bfloat16:  # what sums of another order differ by, the next rounding makes larger
            self.rounding = f"sums by {self.kernels.name.decode()}"

    def prepare(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Weight:
        """Pack (and with int8 quantise) a weight `[out, in]`, fp32 or 16 bit."""
        if self.dtype == torch.int8:
            return Int8Weight(weight, scales, self.kernels)
        return PackedWeight(weight, self.kernels, self.dtype)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        check_rms_norm(x, weight)
        return self._add_rms_norm(x, None, weight, eps)

    def add_rms_norm(
        self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_rms_norm(x, weight, residual)
        return residual, self._add_rms_norm(residual, x, weight, eps)

    def _add_rms_norm(
        self, residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = _empty(*residual.shape)
        _done(self.kernels.add_rms_norm(
            num_threads(), _pointer(residual), residual.stride(0), _pointer(x),
            0 if x is None else x.stride(0), _pointer(weight), eps, *residual.shape, _pointer(out), out.stride(0),
        ))  # fmt: skip
        return out

    def linear_swiglu(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """In one, where the weight's halves are whole panels: 2F numbers a row are not written to memory and read."""
        if not isinstance(weight, NativeWeight) or not weight.gates:
            return super().linear_swiglu(x, weight)
        check_linear(x, weight.out_features, weight.in_features, None, None)
        out = _empty(len(x), weight.out_features // 2)
        weight.multiply(x, None, True, out)
        return out

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        check_swiglu(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = _empty(rows, width)
        _done(self.kernels.swiglu(
            num_threads(), _pointer(gate_up), gate_up.stride(0), rows, width, _pointer(out), width
        ))  # fmt: skip
        return out

    def qk_norm_rope(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> torch.Tensor:
        head_dim = check_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, positions, num_heads, num_kv_heads)
        _done(self.kernels.qk_norm_rope(
            num_threads(), _pointer(qkv), qkv.stride(0), len(qkv), num_heads, num_kv_heads, head_dim,
            _pointer(q_weight), _pointer(k_weight), _pointer(cos), _pointer(sin),
            _pointer(positions, torch.int64), eps,
        ))  # fmt: skip
        return qkv

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens: torch.Tensor,
        seqlens: tuple[int, ...],
        window: int | None,
        scale: float,
        rows: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        prefixes: Prefixes | None = None,
        tiles: torch.Tensor | None = None,
    ) -> torch.Tensor:
        starts = check_attention(q, k, v, cu_seqlens, seqlens, window, rows, out, prefixes)
        out = _empty(*q.shape) if out is None else out
        bounds = starts if rows is None else torch.searchsorted(rows, cu_seqlens.to(rows.dtype)).tolist()
        out[bounds[-1] :] = 0  # of no sequence
        for s, length in enumerate(seqlens):
            first, last = bounds[s], bounds[s + 1]
            if first == last:
                continue
            positions = None if rows is None else rows[first:last] - starts[s]
            keys, values = k[starts[s] :], v[starts[s] :]
            start, shared = (0, 0) if prefixes is None else prefixes.host[s]
            _done(self.kernels.attention(
                self._precision, num_threads(), _pointer(q[first:]), q.stride(0), last - first,
                _pointer(positions, torch.int64), _pointer(keys), k.stride(0), _pointer(values), v.stride(0), length,
                _pointer(k[start:]), _pointer(v[start:]), shared, q.shape[1], k.shape[1], q.shape[2], window or 0,
                scale, _pointer(out[first:]), out.stride(0),
            ))  # fmt: skip
        return out

    def logit(
        self, hidden: torch.Tensor, norm_weight: torch.Tensor, vector: torch.Tensor, eps: float
    ) -> torch.Tensor:
        check_logit(hidden, norm_weight, vector)
        return super().logit(hidden, norm_weight, vector, eps)

    def __reduce__(self) -> Any:
        """Another process finds its own library and instruction set."""
        return NativeOperations, (self.dtype,)


class NativeWeight:
    """A weight `[out, in]` packed into panels for the kernels of one instruction set.

    gates: its halves are whole panels, so that the first can gate the second on the way out.
    """

    def __init__(self, weight: torch.Tensor, kernels: Any) -> None:
        self.out_features, self.in_features = weight.shape
        self.gates = len(weight) % (2 * kernels.panel) == 0

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        check_linear(x, self.out_features, self.in_features, bias, out)
        out = _empty(len(x), self.out_features) if out is None else out
        self.multiply(x, bias, False, out)
        return out

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, gated: bool, out: torch.Tensor) -> None:
        """Into `out` `[T, out]`; gated: `[T, out / 2]`, see kernels.h. Shapes have been checked."""
        raise NotImplementedError


class PackedWeight(NativeWeight):
    """One in fp32 or bf16; bf16 is read directly.

    Where the processor multiplies bf16 much faster (AMX), a weight in fp32 all of whose numbers are bf16 ones, as those
    of published checkpoints are, is stored as such: the result is as exact.
    """

    def __init__(self, weight: torch.Tensor, kernels: Any, dtype: torch.dtype = torch.float32) -> None:
        check_weight(weight)
        super().__init__(weight, kernels)
        self.dtype = dtype
        source = weight.contiguous() if weight.dtype == torch.bfloat16 else weight.float().contiguous()
        widened = dtype == torch.float32 and kernels.widened_is_faster and _is_bfloat16(source)
        self._stored = torch.bfloat16 if widened else dtype
        suffix = "f32" if self._stored == torch.float32 else "bf16"
        self._linear = kernels.linear_widened if widened else getattr(kernels, f"linear_{suffix}")
        self._unpack = getattr(kernels, f"unpack_{suffix}")
        self._packed = _storage(getattr(kernels, f"packed_{suffix}_size")(*weight.shape), self._stored)
        getattr(kernels, f"pack_{suffix}")(
            _pointer(source, source.dtype), source.dtype == torch.bfloat16, *weight.shape,
            _pointer(self._packed, self._stored),
        )  # fmt: skip

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, gated: bool, out: torch.Tensor) -> None:
        _done(self._linear(
            num_threads(), _pointer(x), x.stride(0), *x.shape, _pointer(self._packed, self._stored), self.out_features,
            _pointer(bias), gated, _pointer(out), out.stride(0),
        ))  # fmt: skip

    def unpack(self) -> torch.Tensor:
        """In fp32; a weight that was packed in bf16 is rounded to it."""
        weight = _empty(self.out_features, self.in_features)
        self._unpack(_pointer(self._packed, self._stored), *weight.shape, _pointer(weight))
        return weight


class Int8Weight(NativeWeight):
    """One rotated (`lastrerank.rotation`) and quantised to int8 (7 bits used), a scale an output."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor | None, kernels: Any) -> None:
        check_weight(weight, scales)
        super().__init__(weight, kernels)
        self._kernels = kernels
        source = weight.contiguous() if weight.dtype == torch.bfloat16 else weight.float().contiguous()
        self._packed = _storage(kernels.packed_i8_size(*weight.shape), torch.int8)
        self._sums = _empty(len(weight), dtype=torch.int32)
        self.scales = _empty(len(weight)) if scales is None else scales.float().contiguous().clone()
        _done(kernels.pack_i8(
            _pointer(source, source.dtype), source.dtype == torch.bfloat16, *weight.shape, scales is not None,
            self._packed.data_ptr(), _pointer(self.scales), self._sums.data_ptr(),
        ))  # fmt: skip

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, gated: bool, out: torch.Tensor) -> None:
        _done(self._kernels.linear_i8(
            num_threads(), _pointer(x), x.stride(0), *x.shape, self._packed.data_ptr(),
            _pointer(self.scales), self._sums.data_ptr(), self.out_features, _pointer(bias), gated, _pointer(out),
            out.stride(0),
        ))  # fmt: skip

    def unpack(self) -> torch.Tensor:
        """What it multiplies by, in fp32: not the weight it was made from."""
        weight = _empty(self.out_features, self.in_features)
        self._kernels.unpack_i8(self._packed.data_ptr(), _pointer(self.scales), *weight.shape, _pointer(weight))
        return weight


def _is_bfloat16(weight: torch.Tensor) -> bool:
    """Whether every number of a weight is one of bf16."""
    return weight.dtype == torch.bfloat16 or all(
        torch.equal(part.to(torch.bfloat16).float(), part) for part in weight.split(1024)
    )


def _done(code: int) -> None:
    """Raises what a kernel's return value says (csrc/kernels.h)."""
    if code == 1:
        raise MemoryError("a native kernel got no memory")
    if code:
        raise RuntimeError("a native kernel got no thread" if code == 2 else "a native kernel failed")


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """On the CPU, whatever the process's defaults are."""
    return torch.empty(size, dtype=dtype, device="cpu")


_HUGE_PAGE = 2 << 20  # bytes


def _storage(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Of a packed weight, in pages of 2 MiB where Linux gives them for the asking.

    A pass reads every weight from end to end, and a virtual machine looks every page up in two tables.
    """
    size = count * dtype.itemsize
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return _empty(count, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _pointer(x: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    """Address of a CPU tensor whose rows are contiguous."""
    if x is None:
        return None
    inner = 1
    for size, stride in zip(reversed(x.shape[1:] or x.shape), reversed(x.stride()), strict=False):
        if size > 1 and stride != inner:
            raise ValueError(f"rows are not contiguous: shape {tuple(x.shape)}, strides {x.stride()}")
        inner *= size
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"expected a {dtype} tensor on the CPU, got {x.dtype} on {x.device}")
    return x.data_ptr()
