"""Triton's interpreter with bfloat16 that is right.

The interpreter holds bfloat16 as uint16 bits and computes with those as integers. Here an operation on bfloat16 widens
its operands to float32, which is exact, and rounds its result once, to nearest even. `tl.device_assert` raises too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

ARITHMETIC = (
    *("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_frem", "create_fneg", "create_fma"),
    *("create_fabs", "create_fcmp", "create_min", "create_max", "create_clampf", "create_precise", "create_exp"),
    *("create_log", "create_sqrt", "create_rsqrt", "create_sin", "create_cos", "create_floor", "create_ceil"),
    "create_erf",
)


def mend_bfloat16() -> None:
    """Patch the interpreter of this process, once."""
    if getattr(Builder, "bfloat16_is_mended", False):
        return
    Builder.bfloat16_is_mended = True
    for name in dir(Builder):
        if name.startswith(ARITHMETIC):
            setattr(Builder, name, _in_float32(getattr(Builder, name), rounds=True))
    Builder.create_dot = _in_float32(Builder.create_dot, rounds=False)  # its result has the accumulator's type
    Builder.cast_impl = _mended_cast(Builder.cast_impl)
    Builder.create_fp_to_fp = _mended_conversion(Builder.create_fp_to_fp)
    interpreter.ReduceScanOpInterface.apply = _mended_reduction(interpreter.ReduceScanOpInterface.apply)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, debug=True)


def patch_language_once() -> None:
    """Patch the interpreter of this process, once: it then patches Triton's language once a launch.

    It does so anew at every call of a function within a kernel, to no effect and for a third of its time.
    """
    if getattr(interpreter, "patches_language_once", False):
        return
    interpreter.patches_language_once = True
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    @functools.cache
    def languages(function: Callable) -> frozenset[str]:
        return frozenset(one.__name__ for one in function.__globals__.values() if one is tl or one is tl.core)

    def patch_once(function: Callable) -> Any:
        if languages(function) <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages(function))
        return patch(function)

    def launch_anew(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar == tl.bfloat16


def _widen(value: Any) -> Any:
    if not _is_bfloat16(value):
        return value
    return Handle((value.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _round(values: np.ndarray) -> Handle:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + to_even) >> np.uint32(16)
    return Handle(np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16), tl.bfloat16)


def _in_float32(operation: Callable, rounds: bool) -> Callable:
    def mended(self, *operands):
        if not any(_is_bfloat16(operand) for operand in operands):
            return operation(self, *operands)
        result = operation(self, *map(_widen, operands))
        return _round(result.data) if rounds and result.data.dtype != np.bool_ else result

    return mended


def _mended_cast(cast: Callable) -> Callable:
    def mended(self, source, target):
        if source.dtype.scalar == target.scalar or tl.bfloat16 not in (source.dtype.scalar, target.scalar):
            return cast(self, source, target)
        source = _widen(source)
        if target.scalar == tl.bfloat16:
            return _round(source.data.astype(np.float32))
        return source if target.scalar == tl.float32 else cast(self, source, target)

    return mended


def _mended_conversion(convert: Callable) -> Callable:
    def mended(self, source, target, rounding):
        kinds = source.dtype.scalar, target.scalar
        if tl.bfloat16 in kinds and all(kind.primitive_bitwidth > 8 for kind in kinds):
            return self.cast_impl(source, target)
        return convert(self, source, target, rounding)

    return mended


def _mended_reduction(reduce: Callable) -> Callable:
    def mended(self, inputs):
        if not isinstance(inputs, tuple):
            return mended(self, (inputs,))[0]
        narrow = [one.dtype.scalar == tl.bfloat16 for one in inputs]
        if not any(narrow):
            return reduce(self, inputs)
        widened = tuple(_retyped(one, _widen(one.handle)) for one in inputs)
        results = reduce(self, widened)
        return tuple(
            _retyped(one, _round(one.handle.data)) if was and one.dtype.scalar == tl.float32 else one
            for one, was in zip(results, narrow, strict=True)
        )

    return mended


def _retyped(like: tl.tensor, handle: Handle) -> tl.tensor:
    kind = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(kind, list(like.shape)) if like.type.is_block() else kind)
