"""Triton's interpreter (3.6 to 3.9) repaired, and buffers that end where memory ends.

All of them keep a block of bfloat16 as uint16 and compute on the bit patterns, without a word: here such blocks are
`ml_dtypes.bfloat16`, which rounds to nearest even. A block of int1 combined with a scalar one becomes int32, which 3.9 then
refuses as a mask. 3.6 takes the scalar out of an array of one element in a way that numpy 2.4 has no more.
Imported in a process with TRITON_INTERPRET=1, before any kernel runs.
"""

from __future__ import annotations

import ctypes
import inspect
import mmap
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_BF16 = np.dtype(ml_dtypes.bfloat16)
_BUILDER = interpreter.InterpreterBuilder


def repair() -> None:
    """Patch the functions through which values enter, leave and change type. Once per process."""
    numpy_dtype = interpreter._get_np_dtype
    patch = interpreter._patch_lang_tensor
    cast, convert, dot = _BUILDER.cast_impl, _BUILDER.create_fp_to_fp, _BUILDER.create_dot

    def get(kind: Any) -> Any:
        return _BF16 if kind.scalar == tl.bfloat16 else numpy_dtype(kind)

    def load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = get(kind)
        stored = np.dtype(np.uint16) if dtype == _BF16 else dtype
        fill = np.zeros(pointers.data.shape, dtype) if other is None else np.asarray(other.data).astype(dtype)
        values = interpreter._interpreter.load(
            pointers.data, mask.data.astype(bool), np.ascontiguousarray(fill).view(stored), stored
        )
        return interpreter.TensorHandle(values.view(dtype), kind)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
        data = value.data
        if pointers.get_element_ty() == tl.bfloat16:
            data = np.ascontiguousarray(data.astype(_BF16)).view(np.uint16)
        return interpreter._interpreter.store(pointers.data, data, mask.data.astype(bool))

    def cast_values(self: Any, value: Any, target: Any) -> Any:
        if tl.bfloat16 not in (value.dtype.scalar, target.scalar):
            return cast(self, value, target)
        return interpreter.TensorHandle(value.data.astype(np.float32).astype(get(target)), target.scalar)

    def convert_floats(self: Any, value: Any, target: Any, rounding: Any) -> Any:
        if tl.bfloat16 in (value.dtype.scalar, target.scalar):
            return cast_values(self, value, target)
        return convert(self, value, target, rounding)

    def widened(value: Any) -> Any:
        if value.dtype.scalar != tl.bfloat16:
            return value
        return interpreter.TensorHandle(value.data.astype(np.float32), tl.float32)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, *others: Any) -> None:
        """Triton looks through all names of its language at every call of a function, a third of the tests' time."""
        for name in builtins_of(package):
            member = getattr(package, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *others)

    interpreter._patch_builtin = patch_builtin
    interpreter._get_np_dtype, interpreter._patch_lang_tensor = get, patch_tensor
    _BUILDER.create_masked_load, _BUILDER.create_masked_store = load, store
    _BUILDER.cast_impl, _BUILDER.create_fp_to_fp = cast_values, convert_floats
    _BUILDER.create_dot = lambda self, a, b, sums, *rest: dot(self, widened(a), widened(b), sums, *rest)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(t: torch.Tensor) -> torch.Tensor:
    """A contiguous copy whose last byte is the last one before a page that cannot be touched. Never given back."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    if size == 0:
        return t
    total = (-(-size // page) + 2) * page
    start = _libc.mmap(None, total, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value), "mmap failed"
    for fence in (start, start + total - page):
        assert _libc.mprotect(fence, page, 0) == 0, "mprotect failed"
    memory = (ctypes.c_char * size).from_address(start + total - page - size)
    copy = torch.frombuffer(memory, dtype=t.dtype).view(t.shape)
    copy.copy_(t)
    return copy
